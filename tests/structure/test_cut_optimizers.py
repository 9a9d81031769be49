"""Optimizers follow: what they remember is cut, and training goes on as if the small model had been there before."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, StateError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
}


def dead_rows():
    """A model of whose hidden units three are dead, and get no gradient but decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:3] = 0
    model[2].weight.data[:, :3] = 0
    return model


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_that_of_the_masked_model(kind):
    model = dead_rows()
    groups = [{"params": [model[0].weight], "lr": 0.02}, {"params": list(model[2].parameters())}]
    optimizer = KINDS[kind](groups)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    beside = KINDS[kind]([{"params": [other[0].weight], "lr": 0.02}, {"params": list(other[2].parameters())}])
    beside.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = sc.shrink(model, X, optimizer=optimizer)
    assert small[0].out_features == 5
    train(small, optimizer, 3)
    train(other, beside, 3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert torch.allclose(small(X), other(X), atol=1e-5)


def test_a_state_of_another_shape_is_refused_and_the_optimizer_stays():
    model = dead_rows()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1)
    before = [*optimizer.param_groups[0]["params"]], set(optimizer.state)
    with pytest.raises(InputError, match=r"row_var of 0\.weight as \(8, 1\).*make a new one for the small model"):
        sc.shrink(model, X, 0.5, optimizer=optimizer)
    assert ([*optimizer.param_groups[0]["params"]], set(optimizer.state)) == before


def test_parameters_at_a_place_of_its_own_are_refused():
    model = dead_rows()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(InputError, match=r"LBFGS keeps parameters in _params too.*make a new one for the small model"):
        sc.shrink(model, X, 0.5, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight


def test_a_history_is_refused():
    model = dead_rows()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model[0].weight]["old_dirs"] = [torch.zeros(8, 4)]
    with pytest.raises(InputError, match="make a new one for the small model"):
        sc.shrink(model, X, 0.5, optimizer=optimizer)


def test_a_pruner_that_still_follows():
    model = dead_rows()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    with pytest.raises(StateError, match=r"call its finish\(\) first"):
        sc.shrink(model, X, masks=pruner.masks, optimizer=optimizer)
    pruner.detach()


def test_no_optimizer():
    with pytest.raises(InputTypeError, match=r"torch\.optim\.Optimizer that trains this model"):
        sc.shrink(dead_rows(), X, 0.5, optimizer=[1])


def test_an_interruption_leaves_the_optimizer_with_the_model():
    class Broken(dict):
        def update(self, *new):
            if not self and not self.known:
                self.known = True
                raise KeyboardInterrupt("stop")
            super().update(*new)

    model = dead_rows()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2)
    optimizer.state = Broken(optimizer.state)
    optimizer.state.known = False
    steps = {id(p): state["step"] for p, state in optimizer.state.items()}
    with pytest.raises(KeyboardInterrupt, match="stop"):
        sc.shrink(model, X, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert {id(p): state["step"] for p, state in optimizer.state.items()} == steps
