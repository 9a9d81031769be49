"""How a pruner begins a training, or goes on with one."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, MaskError, StateError
from secateur.integrations.beginning import begin, given, worth_telling


def made(seed=0, steps=0):
    torch.manual_seed(seed)
    model = nn.Linear(20, 10)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 8))
    for _ in range(steps):
        pruner.step()
    return pruner, model


def test_anew_and_after_the_end():
    for steps in (0, 8, 9):
        pruner, _ = made(steps=steps)
        begin(pruner, None)
        assert pruner.steps == steps


def test_not_in_the_middle_of_another_training():
    pruner, _ = made(steps=3)
    with pytest.raises(StateError, match=r"steps=3.* is in the middle of another training: go on from a checkpoint"):
        begin(pruner, None)


def test_where_it_stopped():
    saved, model = made(steps=3)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 8))
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))  # of a training that was interrupted
    begin(pruner, saved.state_dict())
    assert (pruner.steps, pruner.masks) == (3, saved.masks)
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_state_of_another_run():
    pruner, _ = made(seed=1)
    with pytest.raises(MaskError, match="of another run than the weights: weight is not zero where it pruned"):
        begin(pruner, made(steps=3)[0].state_dict())
    with pytest.raises(InputError, match="other settings: schedule"):
        begin(made()[0], sc.Pruner(nn.Linear(20, 10), 0.8).state_dict())


def test_what_is_no_pruner():
    pruner, _ = made()
    assert given(pruner) is pruner
    with pytest.raises(InputTypeError, match=r"pruner is a type: give a secateur\.Pruner"):
        given(sc.Pruner)


def test_what_is_worth_telling():
    """Masks that move at each step would fill a log."""
    model = nn.Linear(100, 100)
    pruner = sc.Pruner(model, 0.305, schedule=sc.linear(0, 300), regrow=sc.feedback.dpf(every=1))
    told = [0.0]
    pruner.on_update(lambda _: told.append(pruner.sparsity) if worth_telling(pruner, told[-1]) else None)
    for _ in range(330):
        pruner.step()
    assert 25 < len(told) <= 32
    assert told[-1] == 0.305
