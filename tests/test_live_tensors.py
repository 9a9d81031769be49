"""secateur.live_tensors: whether what was in scope is the model's still (see also test_pruner_model)."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import secateur as sc
from secateur import live_tensors
from secateur.errors import StateError


def planned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    scope = sc.weights(model)
    masks = sc.Masks({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in scope.items()})
    return model, scope, masks


def test_nothing_is_told_of_a_model_as_it_was():
    assert list(live_tensors.troubles(*planned())) == []


def test_a_replaced_layer_is_told_and_a_renewed_parameter_is_not():
    model, scope, masks = planned()
    model[0].weight = nn.Parameter(torch.zeros(8, 8))
    assert list(live_tensors.troubles(model, scope, masks)) == []
    model[1] = nn.Linear(8, 8)
    (told,) = live_tensors.troubles(model, scope, masks)
    assert "1.weight is no longer the model's" in told
    assert "make a new Pruner" in told


def test_a_weight_that_is_computed_is_no_longer_here():
    model, scope, masks = planned()
    orthogonal(model[1])
    assert list(live_tensors.here(scope)) == ["0.weight"]
    (told,) = live_tensors.troubles(model, scope, masks)
    assert "remove_parametrizations" in told


def test_another_shape_is_refused():
    model, scope, masks = planned()
    model[0].weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(StateError, match="make a new Pruner"):
        list(live_tensors.troubles(model, scope, masks))


def test_zeros_that_nothing_holds_are_counted():
    model, scope, masks = planned()
    with torch.no_grad():
        model[0].weight[0].zero_()
        model[1].weight.zero_()  # begun so
    assert live_tensors.loose_zeros(scope, masks, scope) == 8
    assert live_tensors.loose_zeros(scope, masks, ["1.weight"]) == 0


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_a_layer_that_was_left_out_and_wrapped_since_is_no_newcomer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    scope = sc.weights(model, skip=["1", "2"])
    model[1] = Wrapped(model[1])
    assert live_tensors.newcomers(model, scope) == {}
    model[1].inner.weight = nn.Parameter(torch.zeros(8, 8))
    assert live_tensors.newcomers(model, scope) == {}
    model.append(nn.Linear(8, 2))
    assert live_tensors.newcomers(model, scope) == {"3.weight": 16}


class Passing(Wrapped):
    """Passes on what it does not have, as FullyShardedDataParallel does."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


@pytest.mark.parametrize("wrapper", [Wrapped, Passing])
def test_a_layer_that_was_wrapped_since_is_still_there(wrapper):
    model, scope, masks = planned()
    model[0] = wrapper(model[0])
    assert list(live_tensors.troubles(model, scope, masks)) == []
    model[0].inner = nn.Linear(8, 8)
    (told,) = live_tensors.troubles(model, scope, masks)
    assert "0.weight is no longer the model's" in told


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8))
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a[0].weight


def swap_layer(model):
    model.a = nn.Sequential(model.b)


def swap_the_inside_of_a_layer(model):
    model.a[0] = nn.Linear(8, 8)


def untie(model):
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())


def renew(model):
    model.a[0].weight = model.b.weight = nn.Parameter(torch.zeros(8, 8))


def reshape(model):
    model.b.weight.data = torch.zeros(4, 8)


def swap_tensors(model):
    class Other(nn.Parameter):
        pass

    torch.utils.swap_tensors(model.b.weight, Other(torch.zeros(8, 8)))


def compute(model):
    orthogonal(model.b)


def new_dict(model):
    model.a.__setstate__({**vars(model.a), "_modules": {"0": nn.Linear(8, 8)}})


CHANGES = [swap_layer, swap_the_inside_of_a_layer, untie, renew, reshape, swap_tensors, compute, new_dict]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_ways_stand_until_the_model_comes_to_its_tensors_otherwise(change):
    model = Tied()
    ways = live_tensors.ways(model, sc.weights(model))
    assert ways is not None
    assert ways.stand()
    model.a[0].bias = nn.Parameter(torch.zeros(8))  # not in scope
    model.b.weight.data = torch.ones(8, 8)
    assert ways.stand()
    change(model)
    assert not ways.stand()


@pytest.mark.parametrize("wrapper", [Wrapped, Passing])
def test_there_are_no_ways_to_a_layer_that_was_wrapped(wrapper):
    model, scope, _ = planned()
    model[0] = wrapper(model[0])
    assert live_tensors.ways(model, scope) is None
