"""What a forward was seen to be: it is looked at when it is new or changed for good, not at each call."""

import copy

import torch
from torch import nn

from secateur.runtime import attributes, traced


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.times = nn.Linear(2, 2), 2
        self.eval()

    def forward(self, x):
        return self.layer(x) * self.times


class Times(traced.Traced):
    """Sees how often."""

    looks = 0

    def look(self, module):
        self.looks += 1
        return module.times, ["found"]


def test_looked_at_once():
    module, seen = Twice(), Times(2)
    assert [seen.found(module) for _ in range(3)] == [["found"]] * 3
    assert seen.looks == 1


def test_another_forward_is_not_run_and_looked_at_when_it_stays():
    module, seen = Twice(), Times(2)
    assert seen.found(module)
    module.times = 3
    assert seen.found(module) is None
    assert (seen.looks, seen.found(module), seen.looks) == (1, None, 2)
    assert (seen.found(module), seen.looks) == (None, 2)
    module.times = 2
    assert [seen.found(module) for _ in range(3)] == [None, ["found"], ["found"]]


def test_an_attribute_that_never_stays_is_never_worth_a_look():
    module, seen = Twice(), Times(2)
    assert seen.found(module)
    for i in range(5):
        module.calls = [i]
        assert seen.found(module) is None
    assert seen.looks == 1


def test_hooks_inside_and_training_are_waited_for():
    module, seen = Twice(), Times(2)
    handle = module.layer.register_forward_hook(print)
    assert seen.found(module) is None
    handle.remove()
    assert seen.found(module.train()) is None
    assert (seen.looks, seen.found(module.eval()), seen.looks) == (0, ["found"], 1)


def test_no_words_are_never_found(monkeypatch):
    assert Times(0).found(Twice()) is None
    monkeypatch.setattr(attributes, "_MOST", 10)
    assert Times(2).found(Twice()) is None


def test_copies_look_anew():
    module, seen = Twice(), Times(2)
    assert seen.found(module)
    other = copy.deepcopy(seen)
    assert (other.words, other.looks, other.found(copy.deepcopy(module))) == (2, 0, ["found"])
    seen.forget()
    assert (seen.found(module), seen.looks) == (["found"], 2)


def test_only_calls_of_one_tensor_are_usual():
    x = torch.ones(1)
    assert traced.is_usual([x], {})
    assert not any(traced.is_usual(*given) for given in (([x, x], {}), ([x], {"y": 1}), ([nn.Parameter(x)], {})))
