"""secateur.measurement.reports: what was asked, what is there."""

import json
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import MaskError, UnknownNameError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def test_asked_and_got():
    model = net()
    result = sc.report(model, sc.prune(model, 0.5))
    assert result.asked == result.got == 0.5
    assert [line.name for line in result.lines] == ["0.weight", "2.weight"]
    assert [line.weights for line in result.lines] == [24, 8]
    assert sum(line.got for line in result.lines) == 16
    assert result.parameters == 38
    assert result.effective_parameters == 22


def test_zeros_that_came_back_and_zeros_that_were_there():
    model = net()
    masks = sc.prune(model, 0.5)
    with torch.no_grad():
        model[2].weight.fill_(1)
        model[0].weight.fill_(0)
    first, second = sc.report(model, masks).lines
    assert first.got == 24 > first.asked
    assert second.got == 0 < second.asked


def test_dead_outputs():
    model = net()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = mask[3] = False
    masks = sc.Masks({"0.weight": mask})
    masks.apply(model)
    (line,) = sc.report(model, masks).lines
    assert (line.outputs, line.dead_outputs) == (4, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_dead_outputs_of_convolutions(transposed):
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 5, 2, bias=False)
    mask = torch.ones(layer.weight.shape, dtype=torch.bool)
    if transposed:  # its weight is [in, out, height, width]
        mask[:, 4] = False
    else:
        mask[4] = False
    masks = sc.Masks({"weight": mask})
    masks.apply(layer)
    assert not layer(torch.ones(1, 3, 4, 4))[:, 4].any()
    (line,) = sc.report(layer, masks).lines
    assert (line.outputs, line.dead_outputs) == (5, 1)


def test_many_rows():
    layer = nn.Linear(2, 3000)
    mask = torch.ones(3000, 2, dtype=torch.bool)
    mask[::3] = False
    masks = sc.Masks({"weight": mask})
    masks.apply(layer)
    assert sc.report(layer, masks).lines[0].dead_outputs == 1000


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    result = sc.report(model, sc.prune(model, 0.4))
    assert (result.parameters, result.effective_parameters) == (25, 15)


def test_masks_of_a_bias_and_of_nothing():
    model = net()
    masks = sc.Masks({"0.bias": torch.tensor([True, False, True, True])})
    masks.apply(model)
    (line,) = sc.report(model, masks).lines
    assert (line.weights, line.asked, line.outputs, line.dead_outputs) == (4, 1, 0, 0)
    nothing = sc.report(model, sc.Masks({}))
    assert nothing.asked == nothing.got == 0


def test_nan_is_no_zero():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    masks = sc.Masks({"0.weight": torch.zeros(4, 6, dtype=torch.bool)})
    assert sc.report(model, masks).got == 0


def test_of_another_model():
    with pytest.raises(UnknownNameError):
        sc.report(net(), sc.Masks({"9.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(MaskError):
        sc.report(net(), sc.Masks({"0.weight": torch.ones(2, dtype=torch.bool)}))


def test_as_text_markdown_and_plain_data():
    model = net()
    result = sc.report(model, sc.prune(model, 0.5))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["asked"] == 0.5
    assert data["lines"][0]["name"] == "0.weight"
    assert "22 of 38 parameters" in str(result)
    assert str(result).count("\n") == 5
    assert result.markdown().startswith("| tensor")
    assert "50.00 %" in result.markdown()


def test_the_model_is_only_read():
    model = net()
    masks = sc.prune(model, 0.5)
    versions = [p._version for p in model.parameters()]
    sc.report(model, masks)
    assert [p._version for p in model.parameters()] == versions
