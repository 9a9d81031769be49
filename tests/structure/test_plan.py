import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import InputError, MaskError, StructureError
from secateur.structure import Plan, propose, shrink
from secateur.structure.capture import capture
from secateur.structure.groups import Groups
from secateur.structure.plan import as_plan
from secateur.structure.policy import Policy


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
    plan, other, trained = Plan.from_json(propose(model, x).to_json()), copy.deepcopy(model), copy.deepcopy(model)
    assert set(plan.shifts) == {"4.bias"}
    trained[4].bias.data += 1  # stays
    plan.apply(copy.deepcopy(trained))
    trained[1].bias.data[0] += 1  # goes
    for call in (lambda: plan.apply(trained), lambda: plan.apply_state_dict(trained.state_dict())):
        with pytest.raises(InputError, match=r"those of 1\.bias have other weights"):
            call()
    assert trained[0].out_channels == 8
    small = shrink(model, x)
    state = plan.apply_state_dict(other.state_dict())
    plan.apply(other)
    assert other[0].out_channels == 5
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())
    assert torch.equal(other(x), small(x))
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_a_plan_says_what_shrink_removes_and_is_proven():
    model, x = made()
    plan = Plan.from_json(propose(model, x, 0.5, verify=False).to_json())
    assert not plan.proven
    small = shrink(model, x, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), shrink(model, x, 0.5).parameters(), strict=True))
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(other.parameters())
    assert shrink(other, x, plan=plan, optimizer=optimizer)[0].out_channels == 4
    assert optimizer.param_groups[0]["params"][0].shape == (4, 3, 3, 3)


def test_a_plan_of_dead_units_keeps_the_function():
    model, x = made()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].bias[:3] = torch.tensor([1.0, 2.0, -1.0])
    small = shrink(model, x, plan=Plan.from_json(propose(model, x).to_json()))
    assert small[0].out_channels == 5
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_a_plan_that_does_not_fit_is_refused():
    model, x = made()
    plan = propose(model, x, 0.5)
    with pytest.raises(MaskError, match="before anything is cut from it"):
        shrink(shrink(model, x, 0.5), x, plan=plan)
    torn = replace(plan, kept={**plan.kept, "1.weight": {0: [0, 1, 2, 3]}, "0.weight": {0: [4, 5, 6, 7]}})
    with pytest.raises(
        StructureError, match=r"other units of .* than can go together here\. Make a plan of this model"
    ):
        shrink(model, x, plan=torn)
    outputs = replace(plan, kept={**plan.kept, "4.bias": {0: [0, 1]}}, shapes={**plan.shapes, "4.bias": (5,)})
    with pytest.raises(StructureError, match=r"4\.bias\[0\], which stay here: an output of the model\. Make a plan"):
        shrink(model, x, plan=outputs)


def test_two_shrinks_in_turn_are_two_plans_in_turn():
    model, x = made()
    first = propose(model, x, 0.5)
    once = shrink(model, x, 0.5)
    second = propose(once, x, 0.5)
    other = copy.deepcopy(model)
    for text in (first.to_json(), second.to_json()):
        Plan.from_json(text).apply(other)
    want = shrink(once, x, 0.5)
    assert other[0].out_channels == 2
    assert torch.equal(other(x), want(x))
    state = second.apply_state_dict(first.apply_state_dict(model.state_dict()))
    assert all(torch.equal(state[name], t) for name, t in want.state_dict().items())


def test_one_name_of_tied_tensors_is_enough():
    tied = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)).eval()
    tied[1].weight = tied[0].weight
    plan = Plan.from_json(propose(tied, torch.arange(9), 0.5).to_json())
    assert plan.tied == (("0.weight", "1.weight"),)
    state = {name: t for name, t in tied.state_dict().items() if name == "0.weight"}
    assert plan.apply_state_dict(state)["0.weight"].shape == (9, 4)


def test_lists_stay_lists():
    class Widths(nn.Module):
        def __init__(self):
            super().__init__()
            self.widths = [3, 8]
            self.a, self.b = nn.Linear(3, 8), nn.Linear(16, 2)

        def forward(self, x):
            return self.b(self.a(x).unflatten(0, (1, -1)).reshape(-1, 2 * self.widths[1]))

    model = Widths().eval()
    Plan.from_json(propose(model, torch.randn(4, 3), 0.5).to_json()).apply(model)
    assert model.widths == [3, 4]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_in_the_middle_changes_nothing(interrupted, at):
    model, x = made()
    plan, before = propose(model, x, 0.5), copy.deepcopy(model)
    interrupted(at)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        plan.apply(model)
    assert repr(model) == repr(before)
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in model.state_dict().items())


def test_explain_says_what_holds_and_what_couples():
    model, x = made()
    held = {axis: group.held for group in propose(model, x, 0.5).groups for axis in group.axes}
    assert held["0.weight[1]"].startswith("an input of the model, read by conv2d in 0")
    assert held["0.weight[2]"].startswith("conv2d in 0")
    assert held["4.weight[0]"] == "an output of the model"

    groups = Groups(capture(model, [((x,), {})], Policy()))
    groups.stuck = {0: "view in the model (model.py:3)"}
    kept = np.ones(len(groups.root), bool)
    coupled = {axis: group.held for group in as_plan(model, groups, kept, [0], ()).groups for axis in group.axes}
    assert coupled["0.weight[0]"] == "coupled by view in the model (model.py:3)"


def test_a_plan_of_a_dimension_that_is_of_several_units():
    """A vector of spectral norm lies over channels and places of a kernel."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    plan = propose(model.eval(), x, 0.5)
    small = shrink(model, x, plan=plan)
    assert small[2].parametrizations.weight.original.shape == (3, 4, 3, 3)
    torch.testing.assert_close(small(x), shrink(model, x, 0.5)(x))
