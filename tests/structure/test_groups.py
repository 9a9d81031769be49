import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.groups import Groups, scores
from secateur.structure.policy import Policy

assert rules


def of(model, *inputs):
    return Groups(capture(model, [(inputs, {})], Policy()))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def test_cells_are_the_hidden_layers():
    assert [len(cell) for cell in of(mlp(), torch.randn(3, 4)).cells] == [8, 6]


def totals(groups):
    per = scores(groups, lambda name, w: w.abs())
    return per, np.bincount(groups.root, per, len(per))


def test_a_multiple_of_positions_stays():
    cap = capture(mlp(), [((torch.randn(3, 4),), {})], Policy())
    cap.ledger.multiple(next(axis.labels for axis in Groups(cap).axes if str(axis) == "2.weight[0]"), 4, "config")
    groups = Groups(cap)
    assert groups.select(totals(groups)[0], 0.4)[1] == [4, 2]


def test_scores_are_summed_over_all_tensors_of_a_group():
    model = mlp()
    groups = of(model, torch.randn(3, 4))
    first, second = model[0], model[2]
    want = first.weight.abs().sum(1) + first.bias.abs() + second.weight.abs().sum(0)
    assert torch.allclose(torch.tensor(totals(groups)[1][groups.cells[1]]), want.double().detach(), atol=1e-5)


def test_the_lowest_go_and_one_stays():
    groups = of(mlp(), torch.randn(3, 4))
    per, total = totals(groups)
    kept, counts = groups.select(per, 0.5)
    assert counts == [4, 3]
    cell = groups.cells[0]
    assert max(total[cell[~kept[cell]]]) <= min(total[cell[kept[cell]]])
    assert groups.select(per, 0.99)[1] == [7, 5]


@pytest.mark.parametrize(
    ("score", "remedy"), [(lambda n, w: w[:1], "score for each"), (lambda n, w: w * np.nan, "inf for")]
)
def test_scores_that_cannot_be_used(score, remedy):
    with pytest.raises(InputError, match=remedy):
        scores(of(mlp(), torch.randn(3, 4)), score)


def test_equal_parts_are_checked():
    groups = of(
        nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), torch.randn(3, 4)
    )
    kept, _ = groups.select(scores(groups, lambda name, w: w.abs()), 0.5)
    rows, why = groups.blocks[0]
    kept[rows[0]], kept[rows[1][0]] = True, False
    kept[rows[1][1:]] = True
    assert "unflatten" in next(groups.unequal(kept))[1]
    assert "unflatten" in why
