"""secateur.measurement.reports: what was asked, what is there."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputTypeError, MaskError, UnknownNameError


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
    with pytest.raises(UnknownNameError, match=r"valid names are|nearest names are"):
        sc.report(net(), sc.Masks({"9.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(MaskError, match=r"0\.weight"):
        sc.report(net(), sc.Masks({"0.weight": torch.ones(2, dtype=torch.bool)}))


def test_as_text_markdown_and_plain_data():
    model = net()
    result = sc.report(model, sc.prune(model, 0.5))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["asked"] == 0.5
    assert data["lines"][0]["name"] == "0.weight"
    assert "22 of 38 parameters" in str(result)
    assert max(len(line) for line in str(result).splitlines()) <= 80
    assert result.markdown().startswith("| tensor")
    assert "50.00 %" in result.markdown()


def test_the_model_is_only_read():
    model = net()
    masks = sc.prune(model, 0.5)
    versions = [p._version for p in model.parameters()]
    sc.report(model, masks)
    assert [p._version for p in model.parameters()] == versions


# the whole model, and without masks


def test_a69_the_share_of_the_whole_model():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Embedding(30, 10))
    result = sc.report(model, sc.prune(model, 0.8))
    assert (result.got, result.of_model) == (0.8, 0.2)
    assert "20.00 % of the whole model is zero" in str(result)
    assert result.to_dict()["of_model"] == 0.2


def test_without_masks_the_zeros_are_told_as_they_are():
    model = net()
    sc.prune(model, 0.5)
    result = sc.report(model)
    assert (result.asked, result.got) == (None, 0.5)
    assert [line.name for line in result.lines] == ["0.weight", "2.weight"]
    assert "asked" not in str(result)
    assert json.loads(json.dumps(result.to_dict()))["asked"] is None
    tied = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert [line.name for line in sc.report(tied).lines] == ["2.weight"]


@pytest.mark.parametrize("size", [(367, 361), (1000, 1001), (770, 131), (300, 173)])
def test_asked_is_the_number_that_was_asked(size):
    layer = nn.Linear(*size, bias=False)
    for asked in (0.9, 0.3, 0.95):
        assert sc.report(layer, sc.prune(layer, asked)).asked == asked
        nn.init.normal_(layer.weight)


def test_asked_of_few_weights_is_their_fraction():
    layer = nn.Linear(7, 1, bias=False)
    assert sc.report(layer, sc.prune(layer, 0.5)).asked == 4 / 7


def test_the_tensor_that_suffers_most():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert sc.report(model).hardest_hit is None
    with torch.no_grad():
        model[0].weight[:, :3] = 0
        model[1].weight[2] = 0
    result = sc.report(model)
    assert result.hardest_hit is result.lines[1]
    assert "hardest hit: 1.weight, with 1 of 4 outputs dead and 75.00 % of its weights kept" in str(result)
    assert result.to_dict()["hardest_hit"] == "1.weight"


@pytest.mark.parametrize("turned", [False, True])
def test_dead_outputs_of_experts(turned):
    module = nn.Module()
    up, down = ((3, 4, 10), (3, 5, 4)) if turned else ((3, 10, 4), (3, 4, 5))
    module.gate_up_proj, module.down_proj = (nn.Parameter(torch.ones(shape)) for shape in (up, down))
    with torch.no_grad():
        (module.gate_up_proj.transpose(1, 2) if turned else module.gate_up_proj)[1, 7] = 0
    first, second = sc.report(module).lines
    assert (first.outputs, first.dead_outputs, second.outputs, second.dead_outputs) == (30, 1, 12, 0)


# packed, quantized, masked by others


def test_models_of_torch_prune_are_told_as_they_compute():
    model = net()
    masks = sc.prune(copy.deepcopy(model), 0.5)
    for name in ("0", "2"):
        torch.nn.utils.prune.custom_from_mask(model.get_submodule(name), "weight", masks[f"{name}.weight"])
    result = sc.report(model, masks)
    assert result.got == result.asked == sc.report(model).got == 0.5
    assert result.parameters == 38
    assert sc.check(model, masks) == {}
    before = copy.deepcopy(model.state_dict())
    for verb in (masks.apply, lambda m: sc.remask(m, masks)):
        with pytest.raises(UnknownNameError, match=r"0\.weight is under a mask.*sc\.from_torch_prune\(model\)"):
            verb(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with pytest.raises(UnknownNameError, match=r"sc\.plain_state_dict\(state_dict\)"):
        sc.check(model.state_dict(), masks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_models_are_told_as_they_compute():
    model = net()
    masks = sc.prune(model, 0.5)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    result = sc.report(small, masks)
    assert result.asked == 0.5 <= result.got
    assert sc.report(small).got == result.got
    assert sc.check(small, masks) == {}


@pytest.mark.parametrize("kind", ["int8", "qint8"])
def test_tensors_of_integers_are_told(kind):
    masks = sc.Masks({"w": torch.tensor([[True, False], [False, True]])})
    values = torch.tensor([[1.0, 0.0], [0.5, -1.0]])
    if kind == "int8":
        tensor = (values * 2).to(torch.int8)
    else:
        tensor = torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)
    assert sc.check({"w": tensor}, masks) == {"w": 1}
    module = nn.Module()
    module.w = nn.Parameter(tensor, requires_grad=False)
    assert sc.check(module, masks) == {"w": 1}
    assert sc.report(module, masks).lines[0].got == 1
    if kind == "qint8":
        with pytest.raises(InputTypeError, match=r"w is quantized.*prune before quantizing"):
            masks.apply(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_models_know_their_outputs():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    with torch.no_grad():
        layer.weight[:2, 1] = 0
    scripted, traced = torch.jit.script(layer), torch.jit.trace(layer, torch.ones(1, 4, 3, 3))
    for model in (layer, scripted):
        (line,) = sc.report(model).lines
        assert (line.outputs, line.dead_outputs) == (6, 1)
    assert sc.report(traced).lines[0].got == 8


def test_what_is_no_masks():
    with pytest.raises(InputTypeError, match=r"masks is a float: give what sc\.prune returned"):
        sc.report(net(), 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_a_weight_that_a_norm_computes_is_reported_as_the_model_computes_it(norm):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    sc.prune(model, 0.5)
    before = sc.report(model)
    norm(model[0])
    model(torch.ones(1, 8))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = sc.report(model)
    assert {line.name: line.got for line in after.lines} == {line.name: line.got for line in before.lines}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())  # only read


def test_the_weights_of_a_normed_lstm_are_reported():
    model = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    assert {line.name for line in sc.report(model).lines} == {"weight_ih_l0", "weight_hh_l0"}
