"""secateur.sheets: what a pattern sees of tensors that it joins."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import patterns
from secateur.errors import PatternError


class Units(patterns.lines):
    """Unit u: row u of the first layer and column u of the second, together."""

    def joined(self, names):
        return [{"0.weight": 0, "2.weight": 1}]


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "lamp"])
def test_a_group_may_span_tensors(allocation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    before = {name: w.detach().abs().clone() for name, w in model.named_parameters()}
    masks = sc.prune(model, 0.5, pattern=Units(0), allocation=allocation)
    rows, columns = masks["0.weight"], masks["2.weight"]
    dead = ~rows.any(1)
    assert torch.equal(dead, ~columns.any(0))
    assert torch.equal(rows.all(1), ~dead)
    assert torch.equal(columns.all(0), ~dead)
    unit = torch.cat([before["0.weight"], before["2.weight"].t()], 1).mean(1)
    assert sorted(unit.argsort()[:5].tolist()) == dead.nonzero().flatten().tolist()


def test_units_stay_pruned_on_a_schedule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 5), pattern=Units(0), score="random")
    before = pruner.masks
    for step in range(1, 6):
        pruner.step()
        assert pruner.masks & before == pruner.masks
        assert int((~pruner.masks["0.weight"].any(1)).sum()) == step
        before = pruner.masks
    assert pruner.finish().sparsity == 0.5


def test_a_span_that_cannot_be_laid_out_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(9, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(PatternError, match=r"joins 0\.weight \+ 2\.weight, of \[9, 10\] slices: join equal ones"):
        sc.prune(model, 0.5, pattern=Units(0))
    with pytest.raises(PatternError, match=r"joins '2\.weight', .*take it into the scope"):
        sc.prune(model, 0.5, pattern=Units(0), scope=sc.weights(model, only="0"))
    with pytest.raises(PatternError, match="give all joined tensors one sparsity"):
        sc.prune(model, {"*": 0.5}, pattern=Units(0))
    assert torch.equal(model[0].weight, before)
