"""Attributes that are watched: what changes is noticed, and what secateur itself notes does not count."""

import pytest
from torch import nn

from networks_by_hand import ResNet, lively
from secateur.runtime import attributes
from sparse_models import sparse


class Config:
    last = 0


class Base(nn.Module):
    """A module with one attribute, of any kind."""

    def __init__(self, kept=None):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(2, 2, 1), kept
        self.eval()

    def forward(self, x):
        return x if self.kept else self.conv(x)


def test_attributes_that_change_are_noticed():
    model = ResNet(widths=(4,)).eval()
    model.options, model.config = {"skip": [1]}, Config()
    watched = attributes.Attributes(model)
    block = model.stages[0][0]
    conv, handles = block.conv1, []
    relu, weight, other = model.relu, conv.weight, nn.Parameter(conv.weight * 1)
    changes = {
        "set": (lambda: setattr(model, "new", 1), lambda: delattr(model, "new")),
        "setting": (lambda: setattr(conv, "stride", (2, 2)), lambda: setattr(conv, "stride", (1, 1))),
        "replaced": (lambda: setattr(model, "relu", nn.Tanh()), lambda: setattr(model, "relu", relu)),
        "hook": (lambda: handles.append(block.register_forward_hook(print)), lambda: handles.pop().remove()),
        "training": (block.train, block.eval),
        "inner": (lambda: model.options["skip"].append(2), lambda: model.options["skip"].pop()),
        "of a config": (lambda: setattr(model.config, "last", 2), lambda: delattr(model.config, "last")),
        "parameter": (lambda: setattr(conv, "weight", other), lambda: setattr(conv, "weight", weight)),
    }
    for name, (change, undo) in changes.items():
        assert watched.same(model), name
        change()
        assert not watched.same(model), name
        undo()
    assert watched.same(model)


def test_notes_of_sparse_layers_do_not_count():
    model = sparse(lively(ResNet(widths=(4,))))
    watched = attributes.Attributes(model)
    model.stages[0][0].conv1.require_fresh()
    assert not watched.same(model)
    assert watched.same_but_notes(model)
    assert watched.same(model)
    model.stages[0][0].conv1.stride = (2, 2)
    assert not watched.same_but_notes(model)


def test_a_plan_of_the_model_itself_does():
    model = sparse(lively(ResNet(widths=(4,))))
    model.plan = 1
    watched = attributes.Attributes(model)
    model.plan = 2
    assert not watched.same_but_notes(model)
    model.plan = 1
    assert watched.same(model)


def test_too_much_to_watch(monkeypatch):
    monkeypatch.setattr(attributes, "_MOST", 100)
    with pytest.raises(ValueError, match="too many attributes"):
        attributes.Attributes(ResNet())


def changes():
    """What changes, and back again, in a module and what is around it."""
    new = {"forward": lambda self, x: x, "skip": True}

    def on(owner, name, value):
        before = vars(owner).get(name)
        return lambda: setattr(owner, name, value), lambda: setattr(owner, name, before)

    class Config:
        skip = False

    class Block(Base):
        skip = False
        options = ({"skip": False},)

        def forward(self, x):
            return x if self.skip else super().forward(x)

    model = Base(({"skip": 1}, Config()))
    model.block, model.act = Block(), nn.ReLU()
    return model, {
        "a class attribute": on(Block, "skip", True),
        "a forward": on(Block, "forward", new["forward"]),
        "what a class holds": (lambda: Block.options[0].update(skip=1), lambda: Block.options[0].update(skip=False)),
        "a class of a block": (
            lambda: setattr(model.act, "__class__", nn.Tanh),
            lambda: setattr(model.act, "__class__", nn.ReLU),
        ),
        "its own class": (lambda: setattr(model, "__class__", Block), lambda: setattr(model, "__class__", Base)),
        "a dict in a tuple": (lambda: model.kept[0].update(skip=2), lambda: model.kept[0].update(skip=1)),
        "an attribute of an object": (lambda: vars(model.kept[1]).update(skip=2), vars(model.kept[1]).clear),
        "a class of an object": on(Config, "skip", True),
    }


def test_changes_are_noticed():
    model, both = changes()
    watched = attributes.Attributes(model)
    for name, (change, undo) in both.items():
        assert watched.same(model), name
        change()
        assert not watched.same(model), name
        undo()
    assert watched.same(model)
