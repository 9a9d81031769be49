"""What is pruned when: blocks, and what stands around them."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration.sections import divide
from secateur.errors import SecateurWarning


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return torch.tanh(self.fc(x)) * scale


class Model(nn.Module):
    """Two chains, layers around them, one that never runs, and how the scale of a block is made."""

    def __init__(self, scale=lambda hidden: torch.ones(())):
        super().__init__()
        self.one = nn.ModuleList(Block() for _ in range(2))
        self.before, self.between, self.after, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.two = nn.ModuleList(Block() for _ in range(3))
        self.scale = scale

    def forward(self, x):
        hidden = self.before(x)
        for block in self.one:
            hidden = block(hidden)
        hidden = self.between(hidden)
        for block in self.two:
            hidden = block(hidden, scale=self.scale(hidden))
        return self.after(hidden)


def sections(model):
    torch.manual_seed(0)
    with torch.no_grad():
        found = divide(model.eval(), ((torch.randn(2, 4),), {}), sc.weights(model).members)
    return [(section.name, [name.removesuffix(".weight") for name in section.members]) for section in found]


def test_in_the_order_in_which_they_run():
    assert sections(Model()) == [
        ("what stands before one.0", ["before"]),
        ("one.0", ["one.0.fc"]),
        ("one.1", ["one.1.fc"]),
        ("what stands before two.0", ["between"]),
        ("two.0", ["two.0.fc"]),
        ("two.1", ["two.1.fc"]),
        ("two.2", ["two.2.fc"]),
        ("what stands after the blocks", ["after", "unused"]),
    ]


def test_a_chain_whose_arguments_hang_on_its_blocks_is_no_chain():
    model = Model(scale=lambda hidden: hidden.mean())
    assert sections(model) == [
        ("what stands before one.0", ["before"]),
        ("one.0", ["one.0.fc"]),
        ("one.1", ["one.1.fc"]),
        ("what stands after the blocks", ["between", *(f"two.{i}.fc" for i in range(3)), "after", "unused"]),
    ]
    model.one = nn.ModuleList([Block()])
    with pytest.warns(SecateurWarning, match=r"\(what two.1 is called with is computed .*the whole model is one block"):
        assert [name for name, _ in sections(model)] == ["the whole model"]


def test_blocks_that_share_a_weight_are_pruned_together():
    model = Model()
    model.two[1].fc.weight = model.one[0].fc.weight
    with pytest.warns(SecateurWarning, match="one.0.fc.weight is tied to a tensor of another one"):
        assert [name for name, _ in sections(model)] == ["the whole model"]
    model = Model()
    model.after.weight = model.one[0].fc.weight
    with pytest.warns(SecateurWarning, match="one.0.fc.weight is tied to a tensor of another one"):
        assert [name for name, _ in sections(model)] == ["the whole model"]
