"""What running a model may change, and how it is kept apart."""

import threading

import pytest
import torch
from torch import nn
from zoo import linear

from secateur.dropout.interception.isolation import changed, fresh, held, require_rest, twin, undisturbed, written
from secateur.errors import InputError, InputTypeError, StateError

X = torch.ones(2, 8)


def test_require_rest():
    model = nn.Sequential(linear(), nn.BatchNorm1d(8)).eval()
    require_rest(model)
    model[1].train()
    with pytest.raises(StateError, match=r"1 is in training mode.*call model\.eval\(\) first"):
        require_rest(model)
    with pytest.raises(StateError, match=r"call model\.eval\(\) first"):
        require_rest(model.train())
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Module"):
        require_rest(3)


def test_undisturbed():
    with torch.enable_grad(), undisturbed():
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_fresh_inputs_are_copies_that_tell_what_was_written():
    call = ((X, 2, "a"), {"y": [X]})
    given = fresh(call)
    assert not written(given, call)
    given[1]["y"][0].add_(1)
    assert written(given, call)
    assert (X == 1).all()


class Stateful(nn.Module):
    """Holds tensors in all places where people keep them."""

    def __init__(self):
        super().__init__()
        self.a, self.kept, self.last = linear(), {}, torch.zeros(2)
        self.register_buffer("count", torch.zeros(()))
        self.run = self.forward  # a bound method

    def forward(self, x):
        return self.a(x)


WRITES = {
    "a buffer": lambda m: m.count.add_(1),
    "another buffer in its place": lambda m: setattr(m, "count", m.count + 1),
    "an attribute": lambda m: m.last.mul_(2),
    "another attribute in its place": lambda m: setattr(m, "last", m.last + 1),
    "a dict": lambda m: m.kept.update(x=torch.ones(1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_twin_writes_is_its_own(name):
    model = Stateful()
    copied = twin(model, model.parameters())
    before, ours = held(copied), held(model)
    assert not changed(before, held(copied))
    WRITES[name](copied)
    assert changed(before, held(copied))
    assert not changed(ours, held(model))
    assert copied.a.weight is model.a.weight
    assert copied.run.__self__ is copied


def test_a_twin_of_what_cannot_be_copied():
    model = Stateful()
    model.lock = threading.Lock()
    copied = twin(model, model.parameters())
    copied.count += 1
    copied.last = None
    assert model.count == 0
    assert model.last is not None
    assert copied.lock is model.lock
    assert copied.a.weight is model.a.weight


def test_a_twin_of_a_model_that_keeps_what_has_a_history():
    model = Stateful()
    model.last = model(X)
    model.lock = torch.zeros(1)
    copied = twin(model, model.parameters())
    assert copied.last is model.last
    assert copied.lock is not model.lock


def test_a_model_without_values_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    with pytest.raises(InputError, match=r"0\.weight is on the meta device.*materialise it first"):
        require_rest(model.to("meta"))
    with pytest.raises(InputError, match=r"weight is lazy: run one batch"):
        require_rest(nn.LazyLinear(2).eval())
