"""secateur.rounds: when the steps of several optimizers are complete; with a Pruner see test_optimizers.py."""

import pytest
import torch
from torch.optim import SGD

import secateur as sc
from secateur.errors import InputError, InputTypeError, SecateurWarning
from secateur.rounds import Round
from tiny import net


def two():
    model = net()
    return model, sc.weights(model), [SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]


def test_a_round_is_complete_when_each_optimizer_has_stepped():
    _, scope, (a, b) = two()
    rounds = Round(scope, [a, b])
    steps = [(a, {"0.weight"}), (a, {"0.weight"}), (b, {"2.weight"}), (b, {"2.weight"}), (a, {"0.weight"})]
    assert [rounds.held(one) for one, _ in steps] == [held for _, held in steps]
    assert [rounds.completes(one, held) for one, held in steps] == [False, False, True, False, True]


def test_an_optimizer_of_nothing_in_scope_is_of_no_concern():
    model, scope, (a, b) = two()
    rounds = Round(scope, [a, b])
    assert rounds.held(SGD(net().parameters(), lr=0.1)) is None
    model.requires_grad_(False)
    frozen = Round(scope, [other := SGD(net().parameters(), lr=0.1)])
    assert frozen.held(other) == set(), "it counts the steps where nothing is trained"
    assert frozen.completes(other, set())


def test_optimizers_that_come_later():
    _, scope, (a, b) = two()
    rounds = Round(scope)
    assert (a in rounds, rounds.given) == (False, [])
    for one in (a, b):
        rounds.add(one)
    assert a in rounds
    assert rounds.optimizers == [a, b]


def test_optimizers_that_will_not_do():
    _, scope, (a, _) = two()
    with pytest.raises(InputError, match=r"2\.weight is in scope and trainable.*give every optimizer"):
        Round(scope, [a])
    with pytest.raises(InputTypeError, match=r"int is not a torch\.optim\.Optimizer.*give the optimizer it wraps"):
        Round(scope, [3])


def test_renewed_parameters_that_none_steps_are_told_of_once():
    model, scope, optimizers = two()
    rounds = Round(scope, optimizers)
    rounds.warn_of_renewed()
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().clone())
    with pytest.warns(SecateurWarning, match=r"2\.weight is in scope.*made from the parameters that the model has now"):
        rounds.warn_of_renewed()
    rounds.warn_of_renewed()


def test_why_a_round_is_incomplete():
    _, scope, (a, b) = two()
    rounds = Round(scope, [a, b])
    assert "of 0.weight, 2.weight never stepped" in rounds.why_incomplete(ever=False)
    assert rounds.why_incomplete(ever=True) is None
    rounds.completes(a, {"0.weight"})
    assert "2.weight was not stepped since" in rounds.why_incomplete(ever=True)
