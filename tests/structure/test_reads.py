import copy

import torch
from torch import nn
from torch.nn import functional as F

from secateur.structure.reads import Named, strays

X = ((torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),), {})


class Net(nn.Module):
    def __init__(self, code):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.code = nn.Linear(4, 4), nn.Linear(4, 4), code

    def forward(self, x):
        return self.code(self, x)


def named(model):
    return Named(model, {id(t): name for name, t in model.named_parameters()})


def differ(code, other, model=None):
    model = model or Net(code)
    with torch.no_grad():
        return strays(named(model), named(Net(other)), X)


def one(self, x):
    return self.b(self.a(x))


def test_the_same_calls_of_the_same_tensors():
    assert differ(one, one) == ""
    assert differ(one, lambda self, x: self.b(self.a(x) + torch.zeros(4))) == ""  # what reads no tensor does not count


def test_what_differs_is_named():
    assert differ(one, lambda self, x: self.a(x)) == "the end comes in place of linear of b.weight, b.bias"
    other = differ(one, lambda self, x: F.linear(self.a(x), self.b.weight, self.a.bias))
    assert other == "linear of b.weight, a.bias comes in place of linear of b.weight, b.bias"
    assert differ(one, lambda self, x: self.b(2 * self.a(x))) == "linear of b.weight, b.bias gives other numbers"
    assert differ(one, lambda self, x: one(self, x)[:2]) == "the outputs differ by inf"
    assert differ(one, lambda self, x: 1.1 * one(self, x)).startswith("the outputs differ by ")
    assert differ(one, lambda self, x: (one(self, x), x)) == "there are 2 outputs in place of 1"
    assert differ(lambda self, x: one(self, x) > 0, lambda self, x: one(self, x) <= 0) == "the outputs differ"


def test_other_weights_of_equal_values_are_other_weights():
    model = Net(one)
    model.b.load_state_dict(model.a.state_dict())
    swapped = copy.deepcopy(model)
    swapped.code = lambda self, x: self.a(self.b(x))
    with torch.no_grad():
        assert "in place of" in strays(named(model), named(swapped), X)
