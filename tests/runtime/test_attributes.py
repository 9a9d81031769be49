"""Attributes that are watched: what changes is noticed, and what secateur itself notes does not count."""

import collections
import weakref

import pytest
from torch import nn

from networks_by_hand import ResNet, lively
from secateur.runtime import attributes, native
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


def assert_noticed(model, changes):
    """Each change is noticed, and that it was undone."""
    watched = attributes.Attributes(model)
    for name, (change, undo) in changes.items():
        assert watched.same(model), name
        change()
        assert not watched.same(model), name
        undo()
    assert watched.same(model)


def test_attributes_that_change_are_noticed():
    model = ResNet(widths=(4,)).eval()
    model.options, model.config = {"skip": [1]}, Config()
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
    assert_noticed(model, changes)


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


def changed(owner, name, value):
    """Setting an attribute, and setting it back."""
    before = getattr(owner, name)
    return lambda: setattr(owner, name, value), lambda: setattr(owner, name, before)


def unlike():
    """A module, and changes to what is equal, or only a little other, and back again."""

    class Block(Base):
        def forward(self, x, skip=False, *, twice=1, options={}):
            return x

        @staticmethod
        def helper(x, skip=False):
            return x

        @property
        def half(self, skip=False):
            return skip

        rate = 1

    model = Block({"first": 1, "second": 2.0})
    model.block, model.act, model.ordered = Block(), Block.forward, collections.OrderedDict(a=1, b=2)
    model.some, model.zero = {1, 2}, 0.0
    named, kept = Block.forward.__kwdefaults__, model.kept

    def turn():
        kept.update(first=kept.pop("first"))

    def turn_back():
        kept.update(second=kept.pop("second"))

    return model, {
        "a default": changed(Block.forward, "__defaults__", (True,)),
        "a default that is equal": changed(Block.forward, "__defaults__", (0,)),
        "a default by name": (lambda: named.update(twice=True), lambda: named.update(twice=1)),
        "defaults by name": changed(Block.forward, "__kwdefaults__", {"twice": 1, "options": {}}),
        "what a default holds": (lambda: named["options"].update(a=1), named["options"].clear),
        "code": changed(Block.forward, "__code__", (lambda self, x, skip=1, *, twice=1, options=0: -x).__code__),
        "a static method": changed(Block.helper, "__defaults__", (True,)),
        "a property": changed(vars(Block)["half"].fget, "__defaults__", (True,)),
        "True for 1": (lambda: kept.update(first=True), lambda: kept.update(first=1)),
        "2 for 2.0": (lambda: kept.update(second=2), lambda: kept.update(second=2.0)),
        "-0.0 for 0.0": changed(model, "zero", -0.0),
        "True for 1 in a class": changed(Block, "rate", True),
        "an element of a set": (
            lambda: model.some.symmetric_difference_update({2, 3}),
            lambda: model.some.symmetric_difference_update({2, 3}),
        ),
        "an order": (turn, turn_back),
        "an order that is kept": (lambda: model.ordered.move_to_end("a"), lambda: model.ordered.move_to_end("b")),
        "an equal dictionary": changed(model, "kept", dict(kept)),
    }


@pytest.mark.parametrize("with_library", [True, False])
def test_what_is_equal_but_not_the_same_is_noticed(with_library, monkeypatch):
    if not with_library:
        monkeypatch.setattr(native, "library", lambda: None)
    model, both = unlike()
    assert_noticed(model, both)


def test_another_object_of_the_same_value_is_no_change():
    model = Base({"words": "a b", "size": (1.5, "x")})
    watched = attributes.Attributes(model)
    model.kept.update(words=" ".join(["a", "b"]), size=(float("1.5"), "x"))
    assert watched.same(model)
    model.kept["size"] = (1.5, "y")
    assert not watched.same(model)


def test_defaults_are_put_back():
    class Block(Base):
        def forward(self, x, skip=False):
            return x

    model = Block()
    watched = attributes.Attributes(model)
    Block.forward.__defaults__ = (True,)
    watched.put_back()
    assert Block.forward.__defaults__ == (False,)
    assert watched.same(model)


def test_what_it_keeps_is_not_the_module():
    model = Base([1])
    gone = weakref.ref(model)
    watched = attributes.Attributes(model)
    del model
    assert gone() is None
    assert not watched.same(Base([1]))


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
    assert_noticed(model, both)
