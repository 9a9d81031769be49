import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.columns import damped
from secateur.structure.criteria import Subject, resolve
from secateur.structure.groups import Groups
from secateur.structure.policy import Policy

assert rules

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(8, 8, generator=GENERATOR)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).eval()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 2), nn.Flatten(), nn.Linear(12, 4)).eval()


def batches(model, count=10):
    if isinstance(model[0], nn.Linear):
        return [torch.randn(16, 8, generator=GENERATOR) @ MIX for _ in range(count)]
    return [torch.randn(16, 2, 5, 5, generator=GENERATOR) for _ in range(count)]


def worth(model, score, stats, example):
    """The score of each unit of the first layer."""
    cap = capture(model, [((example,), {})], Policy())
    groups = Groups(cap)
    per = resolve(score, stats)(Subject(model, cap, groups))
    cell = next(cell for cell in groups.cells if len(cell) == len(model[0].weight))
    return np.bincount(groups.root, per, len(per))[cell]


def test_energy_is_the_mean_square_of_what_is_read_times_the_squares_of_what_reads_it():
    model = mlp()
    seen = batches(model, 4)  # too few to hold one out
    read = torch.tanh(model[0](torch.cat(seen)))
    want = read.square().mean(0) * model[2].weight.square().sum(0)
    got = worth(model, "energy", sc.calibrate(model, seen), seen[0])
    assert got == pytest.approx(want.detach().numpy(), rel=1e-4)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_greedy_goes_by_how_much_the_error_grows(make):
    model = make()
    seen = batches(model)
    stats = sc.calibrate(model, seen)
    (moments,) = stats.of("2.weight")
    weights = model[2].weight.detach().flatten(1).double()
    gram = damped(moments.gram[0] / moments.count[0])
    got = worth(model, "greedy", stats, seen[0])
    order, width = np.argsort(got), weights.shape[1] // len(got)

    def error(gone):
        """Of the best weights for the columns of all other units."""
        stays = torch.ones(len(got), dtype=torch.bool)
        stays[list(gone)] = False
        stays = stays.repeat_interleave(width)
        rest = torch.linalg.solve(gram[stays][:, stays], gram[stays]) if stays.any() else gram[stays]
        return float(((weights @ gram) * weights).sum() - ((weights @ gram[:, stays]) * (weights @ rest.T)).sum())

    most = 0.0
    for n in range(1, len(got) + 1):
        most = max(most, error(order[:n]) - error(order[: n - 1]))
        assert got[order[n - 1]] == pytest.approx(most, rel=1e-4)
        others = [error([*order[: n - 1], other]) for other in order[n:]]
        assert error(order[:n]) <= min(others, default=np.inf) * (1 + 1e-9)


def test_greedy_sees_that_one_of_two_like_units_suffices():
    model = mlp()
    for tensor in (model[0].weight, model[0].bias):
        tensor.data[3] = tensor.data[7]
    seen = batches(model)
    got = worth(model, "greedy", sc.calibrate(model, seen), seen[0])
    assert min(got[3], got[7]) == got.min()
    assert max(got[3], got[7]) > 10 * got.min()


def test_units_that_no_layer_with_statistics_reads_are_ranked_by_their_squares():
    model = mlp()
    seen = batches(model)
    stats = sc.calibrate(model, seen, scope=sc.weights(model, only="0.weight"))
    for score in ("energy", "greedy"):
        assert worth(model, score, stats, seen[0]) == pytest.approx(worth(model, "l2", None, seen[0]))


def test_each_needs_statistics():
    with pytest.raises(InputError, match=r'write score="greedy", stats=sc\.calibrate\(model, batches\)'):
        sc.shrink(mlp(), torch.randn(2, 8), 0.5, score="greedy")
