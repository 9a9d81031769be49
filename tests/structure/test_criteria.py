import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, StateError
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.criteria import CRITERIA, Subject, activation, criterion, of_units, resolve
from secateur.structure.groups import Groups
from secateur.structure.policy import Policy

assert rules


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).eval()


GENERATOR = torch.Generator().manual_seed(0)
X, PICTURES = torch.randn(5, 4, generator=GENERATOR), torch.randn(2, 3, 4, 4, generator=GENERATOR)


def worth(model, score, *inputs):
    """The score of each unit of the largest cell."""
    cap = capture(model, [(inputs, {})], Policy())
    groups = Groups(cap)
    per = resolve(score)(Subject(model, cap, groups))
    return torch.from_numpy(np.bincount(groups.root, per, len(per))[groups.cells[0]]).float()


def of_rows(model, score):
    first, second = model[0], model[2]
    return (score(first.weight).sum(1) + score(first.bias) + score(second.weight).sum(0)).detach()


def test_magnitudes_are_summed_over_all_tensors_of_a_unit():
    assert torch.allclose(worth(mlp(), "magnitude", X), of_rows(mlp(), torch.abs))
    assert torch.allclose(worth(mlp(), "l2", X), of_rows(mlp(), torch.square))


def test_normalised_has_mean_one():
    got, squares = worth(mlp(), "normalised", X), of_rows(mlp(), torch.square)
    assert torch.allclose(got, squares / squares.mean())


def test_taylor_counts_the_tensors_whose_gradients_it_saw():
    model = mlp()
    score = sc.accumulate(model, [X], lambda model, x: model(x).square().mean())
    want = score.sums["0.weight"].sum(1) + score.sums["2.weight"].sum(0)
    assert torch.allclose(worth(model, score, X), want)
    with pytest.raises(InputError, match=r"score=sc\.accumulate\(model, batches, loss\)"):
        resolve("taylor")
    with pytest.raises(StateError, match=r"sc\.accumulate\(model, batches, loss\)"):
        worth(model, sc.scores.taylor(), X)


def test_the_scale_of_batch_norm():
    model = cnn()
    model[1].weight.data = torch.tensor([3.0, -1, 2, 0, 5, 4])
    assert worth(model, "bn_scale", PICTURES).tolist() == [3, 1, 2, 0, 5, 4]


def test_units_without_batch_norm_have_no_scale():
    with pytest.raises(InputError, match=r"units of 0\.weight, 0\.bias, 2\.weight: choose another score, or keep"):
        worth(mlp(), "bn_scale", X)


def test_the_geometric_median_has_the_lowest_score():
    model = mlp()
    model[2].weight.data.zero_()
    model[0].weight.data = torch.tensor([[float(k), 0, 0, 0] for k in (0, 1, 2, 3, 10, -9)])
    assert worth(model, "fpgm", X).argmin() in (1, 2)


def test_activation_is_the_mean_square_of_what_is_read():
    model = mlp()
    assert torch.allclose(worth(model, "activation", X), model[:2](X).detach().square().mean(0))
    other = torch.randn(9, 4)
    assert torch.allclose(worth(model, activation([other, other]), X), 2 * model[:2](other).detach().square().mean(0))


def test_activation_of_a_layer_that_is_flattened():
    model = cnn()
    read = model[:3](PICTURES).detach().square()
    assert torch.allclose(worth(model, "activation", PICTURES), read.mean(0).sum((1, 2)), atol=1e-5)


def test_activation_needs_data():
    with pytest.raises(InputError, match="give batches of real data"):
        worth(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2)), "activation", torch.zeros(1, 4))


class Recurs(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 6, layers, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.qkv, self.out = nn.Linear(4, 24), nn.Linear(24, 72), nn.Linear(24, 2)

    def forward(self, x):
        q, k, v = self.qkv(self.into(x)).view(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


LAYERS = {"convolutions": (cnn, PICTURES), "LSTM": (lambda: Recurs(1), torch.randn(2, 5, 4, generator=GENERATOR))}
LAYERS["attention"] = Attends, torch.randn(2, 5, 4, generator=GENERATOR)


@pytest.mark.filterwarnings("ignore:.*read nothing on these batches:secateur.errors.SecateurWarning")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CRITERIA)
def test_each_score_ranks_units_of_each_kind(kind, name):
    torch.manual_seed(0)
    model, x = LAYERS[kind][0]().eval(), LAYERS[kind][1]
    if name == "bn_scale" and kind != "convolutions":
        with pytest.raises(InputError, match="choose another score, or keep them with keep="):
            sc.shrink(model, x, 0.5, score=name)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    score = sc.accumulate(model, [x], lambda model, x: model(x).square().mean()) if name == "taylor" else name
    if getattr(CRITERIA[name].value, "of_statistics", False):
        score = resolve(name, sc.calibrate(model, [torch.randn(40, *x.shape[1:], generator=GENERATOR)]))
    assert worth(model, score, x).unique().numel() == len(worth(model, score, x))
    small = sc.shrink(model, x, macs=0.5, score=score)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_activation_does_not_see_what_stays_inside_a_call():
    with pytest.raises(InputError, match=r"shows the units of rnn\.weight_ih_l0, .*: choose another score, or keep"):
        sc.shrink(Recurs(2), torch.randn(2, 5, 4), 0.5, score="activation")


def test_random_is_the_same_for_a_seed():
    assert torch.equal(worth(mlp(), "random", X), worth(mlp(), "random", X))
    assert worth(mlp(), "random", X).unique().numel() == 6


def test_any_function_table_or_registered_score_serves():
    assert torch.allclose(worth(mlp(), lambda name, w: w.abs(), X), of_rows(mlp(), torch.abs))
    table = {name: p.abs() for name, p in mlp().named_parameters()}
    assert torch.allclose(worth(mlp(), table, X), of_rows(mlp(), torch.abs))
    flow = sc.scores.synflow(mlp(), X)
    assert worth(mlp(), flow, X).min() >= 0

    @criterion("first units")
    @of_units
    def first(subject):
        return np.arange(len(subject.groups.root), dtype=float)

    try:
        assert worth(mlp(), "first units", X).diff().min() > 0
    finally:
        del CRITERIA._choices["first units"]


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match=r"choose magnitude, l2, normalised, .*activation, random"):
        resolve("size")


def test_the_table_of_the_docs_names_sources():
    assert all(choice.meaning and choice.source for choice in CRITERIA.values())
