"""Models on the meta device: the plan is that of the model with its weights, which proves it."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError
from secateur.structure import Plan, propose
from secateur.structure.meta import Mixed, empty, zeros
from structure.architectures import build

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KINDS = [
    pytest.param("shifted_windows", marks=pytest.mark.slow),  # an index that is a buffer
    "handwritten_gates",  # a state that is made on the CPU
    "gru_zero_initial_state",
    "language_model_with_tied_embedding",
    "pretrained_llama",  # masks that are looked at
]


def mlp(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, **options), nn.ReLU(), nn.Linear(8, 2, **options)).eval()


def emptied(model):
    """The same model without weights; what is tied stays tied, as in a model that is made there."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.to("meta") for b in model.buffers()})


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_is_that_of_the_model_with_its_weights(name):
    model, inputs = build(name)
    plan = propose(emptied(model), inputs, 0.5, score="random", verify=False)
    assert plan.kept == propose(model, inputs, 0.5, score="random").kept
    small = sc.shrink(model, inputs, plan=Plan.from_json(plan.to_json()))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_plan_says_that_it_is_not_proven():
    plan = propose(mlp(device="meta"), X, 0.5, score="random", verify=False)
    assert not plan.proven
    assert "not proven" in plan.explain().text()
    proven = propose(mlp(), X, plan=plan)
    assert proven.proven
    assert proven.kept == plan.kept
    assert "not proven" not in proven.explain().text()


def test_a_model_on_the_meta_device_gets_the_smaller_shapes():
    small = sc.shrink(mlp(device="meta"), X, 0.5, score="random", verify=False)
    plan = propose(mlp(), X, 0.5, score="random")
    small.load_state_dict(plan.apply_state_dict(mlp().state_dict()), assign=True)
    assert torch.equal(small(X), sc.shrink(mlp(), X, 0.5, score="random")(X))


@pytest.mark.parametrize("inputs", [X, X.to("meta")])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"macs": 0.5}, {"params": 0.5}])
def test_shapes_tell_how_much_goes(inputs, amount):
    plan = propose(mlp(device="meta"), inputs, score="random", verify=False, **amount)
    assert len(plan.kept["0.weight"][0]) == 4


def test_scores_of_one_s_own():
    table = {name: torch.arange(float(p.numel())).reshape(p.shape) for name, p in mlp().named_parameters()}
    for score in (table, lambda name, weight: table[name]):
        plan = propose(mlp(device="meta"), X, 0.5, score=score, verify=False)
        assert plan.kept["0.bias"] == {0: [4, 5, 6, 7]}


@pytest.mark.parametrize("score", ["l2", "magnitude", "normalised", "fpgm", "activation"])
def test_scores_that_look_at_weights(score):
    with pytest.raises(InputError, match=f"the score is '{score}', which looks at weights.*give score='random'"):
        propose(mlp(device="meta"), X, 0.5, score=score, verify=False)


def test_what_needs_weights():
    model = mlp(device="meta")
    with pytest.raises(InputError, match="which units are dead: give a sparsity"):
        propose(model, X, verify=False)
    with pytest.raises(InputError, match="the time of a call: give a sparsity"):
        propose(model, X, latency=0.5, verify=False)
    with pytest.raises(InputError, match="give verify=False, and prove the plan later"):
        propose(model, X, 0.5)
    with pytest.raises(InputError, match=r"inputs are on the meta device.*give tensors on the device of the model"):
        propose(mlp(), X.to("meta"), 0.5)


def test_a_forward_that_looks_at_numbers():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, device="meta"), nn.Linear(8, 2, device="meta")

        def forward(self, x):
            y = self.a(x)
            return self.b(y if y.sum() > 0 else -y)

    with pytest.raises(InputTypeError, match="or load its weights: without them a forward cannot look at numbers"):
        propose(Looks(), X, 0.5, score="random", verify=False)


def test_real_tensors_meet_others():
    weight = torch.randn(4, 4, device="meta")
    with Mixed():
        assert (X @ weight).is_meta
        assert not torch.arange(3, device=weight.device).is_meta
        assert not X.to(weight.device).is_meta
        total = torch.zeros(3, 4)
        assert total.add_(X @ weight) is total
        assert weight[torch.tensor([True, False, True, True])].shape == (3, 4)
    assert empty(mlp(device="meta"))
    assert not empty(mlp())
    assert zeros((weight, 1))[0].tolist() == [[0] * 4] * 4
