"""Chains are found by the identity of what their blocks are given, in one forward."""

import torch
from torch import nn

from secateur.calibration.block_chains import course


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, again=None):
        return self.fc(x) + (0 if again is None else again), x.sum()


def chains(model, *args):
    model.eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    found = course(model, (args, {}))
    assert {name: vars(module) for name, module in model.named_modules()} == before
    return [[block.name for block in chain] for chain in found.chains]


class Model(nn.Module):
    """How `join` leads from one block to the next."""

    def __init__(self, join=lambda hidden, x: hidden, order=range(4)):
        super().__init__()
        self.shifts, self.join, self.order = nn.ModuleList(Shift() for _ in range(4)), join, order

    def forward(self, x):
        hidden = x
        for at in self.order:
            hidden, _ = self.shifts[at](self.join(hidden, x))
        return hidden


X = torch.randn(2, 4)


def test_each_takes_what_the_one_before_gave():
    assert chains(Model(), X) == [["shifts.0", "shifts.1", "shifts.2", "shifts.3"]]
    assert chains(Model(order=[2, 0, 3, 1]), X) == [["shifts.2", "shifts.0", "shifts.3", "shifts.1"]]


def test_what_is_changed_on_the_way_is_no_chain():
    assert chains(Model(join=lambda hidden, x: hidden * 2), X) == []
    assert chains(Model(join=lambda hidden, x: x), X) == []


def test_a_block_that_runs_twice_is_in_no_chain():
    assert chains(Model(order=[0, 0, 0]), X) == []
    assert chains(Model(order=[0, 1, 2, 2, 3]), X) == [["shifts.0", "shifts.1"]]


def test_the_longest_of_nested_ones():
    def inner(n):
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(n)))

    model = nn.Sequential(inner(2), inner(5), inner(2))
    found = [[f"0.{i}" for i in range(2)], [f"1.{i}" for i in range(5)], [f"2.{i}" for i in range(2)]]
    assert chains(model, X) == found
    assert chains(nn.Sequential(inner(2), inner(2), inner(2)), X) == [["0", "1", "2"]]


def test_when_each_module_ran():
    model = nn.Sequential(nn.Linear(4, 4), Model(), nn.Linear(4, 4)).eval()
    found = course(model, ((X,), {}))
    times = found.times
    assert times["0"] < found.starts[0] == times["1.shifts.0"] < times["1.shifts.3.fc"] < times["2"]
