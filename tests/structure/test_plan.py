import copy

import pytest
import torch
from torch import nn

from secateur.errors import InputError, MaskError
from secateur.structure import Plan, propose, shrink


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).eval()
    return model, torch.randn(2, 3, 4, 4)


def test_a_plan_survives_json():
    model, x = made()
    plan = propose(model, x, 0.5)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_cuts_another_copy():
    model, x = made()
    plan, other = Plan.from_json(propose(model, x, 0.5).to_json()), copy.deepcopy(model)
    plan.apply(other)
    assert torch.equal(other(x), shrink(model, x, 0.5)(x))
    assert (other[0].out_channels, other[1].num_features, other[4].in_features) == (4, 4, 16)


def test_a_plan_cuts_a_state_dict():
    model, x = made()
    state = propose(model, x, 0.5).apply_state_dict(model.state_dict())
    want = shrink(model, x, 0.5).state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[k], want[k]) for k in want)
    assert state["4.bias"].data_ptr() == model[4].bias.data_ptr()


def test_a_plan_for_another_model_changes_nothing():
    model, x = made()
    plan, small = propose(model, x, 0.5), shrink(model, x, 0.5)
    with pytest.raises(MaskError, match="before anything is cut from it"):
        plan.apply(small)
    with pytest.raises(MaskError, match="apply the plan to a copy of the model it was made for"):
        plan.apply(nn.Linear(2, 2))
    state = model.state_dict()
    del state["0.bias"]
    with pytest.raises(MaskError, match="apply the plan to a copy of the model"):
        plan.apply_state_dict(state)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kept": 3}'])
def test_no_plan(text):
    with pytest.raises(InputError, match="give what to_json"):
        Plan.from_json(text)


def test_explain_says_what_goes_and_what_holds_the_rest():
    model, x = made()
    text = propose(model, x, 0.5).explain().text()
    assert "0.weight[0]" in text
    assert "an output of the model" in text


def test_weights_gone():
    model, x = made()
    gone = propose(model, x, 0.5).weights_gone(model)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, shrink(model, x, 0.5))]
    assert gone == sizes[0] - sizes[1]


def test_a_plan_gives_biases_what_dead_units_took_with_them():
    model, x = made()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].bias[:3] = torch.tensor([1.0, 2.0, -1.0])
    plan, other = Plan.from_json(propose(model, x).to_json()), copy.deepcopy(model)
    assert set(plan.shifts) == {"4.bias"}
    small = shrink(model, x)
    state = plan.apply_state_dict(other.state_dict())
    plan.apply(other)
    assert other[0].out_channels == 5
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())
    assert torch.equal(other(x), small(x))
    assert torch.allclose(small(x), model(x), atol=1e-6)
