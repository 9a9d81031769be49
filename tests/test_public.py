"""The public face: names, docstrings, few parameters, examples that run, silence."""

import ast
import ctypes
import doctest
import importlib
import inspect
import pkgutil
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import is_typeddict

import pytest
import torch
from torch import nn

import secateur as sc

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(sc.__path__, "secateur.")
    if not found.name.endswith(("__main__", "secateur_native"))  # the latter is a library, not a module
)
SOURCES = sorted(Path(sc.__file__).parent.rglob("*.py"))


def public_names(module):
    """`__all__`, or else what the module itself defines without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [n for n, v in vars(module).items() if not n.startswith("_") and inspect.getmodule(v) is module]


def published():
    """Each public class, function and method, by its path."""
    found = {}
    for place in ("secateur", *MODULES):
        module = importlib.import_module(place)
        for name in public_names(module):
            thing = getattr(module, name)
            if not callable(thing) or not getattr(thing, "__module__", "").startswith("secateur"):
                continue
            if inspect.isclass(thing) and issubclass(thing, ctypes.Structure):  # what C reads, with no signature
                continue
            found[f"{thing.__module__}.{name}"] = thing
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    value = getattr(value, "__func__", value)
                    if inspect.isfunction(value) and not method.startswith("_"):
                        found[f"{thing.__module__}.{name}.{method}"] = value
    return found


def test_all_is_what_dir_publishes():
    inner = {m.split(".")[1] for m in MODULES}
    shown = {
        name
        for name in dir(sc)
        if not name.startswith("_") and not (name in inner and isinstance(getattr(sc, name), ModuleType))
    }
    rooms = {name for name in sc.__all__ if isinstance(getattr(sc, name), ModuleType)}
    assert shown | rooms == set(sc.__all__)
    assert rooms <= inner
    assert len(sc.__all__) == len(set(sc.__all__)) <= 40


def test_the_version_is_that_of_the_distribution():
    assert sc.__version__ == metadata.version("secateur")


def test_no_room_bears_the_name_of_a_verb():
    inner = {m.split(".")[1] for m in MODULES}
    assert not inner & {name for name in sc.__all__ if not isinstance(getattr(sc, name), ModuleType)}


def test_every_public_name_is_there_in_each_module():
    for place in MODULES:
        module = importlib.import_module(place)
        assert all(hasattr(module, name) for name in public_names(module)), place


@pytest.mark.parametrize("place", ["secateur", *MODULES])
def test_every_module_says_what_it_is(place):
    assert (importlib.import_module(place).__doc__ or "").strip(), place


def test_every_public_thing_has_a_docstring():
    things = published()
    assert len(things) > 40
    missing = [path for path, thing in things.items() if not (inspect.getdoc(thing) or "").strip()]
    assert missing == []


def signature(thing):
    """What a thing is called with; the options of several verbs, one TypedDict, are called with nothing."""
    return inspect.Signature() if is_typeddict(thing) else inspect.signature(thing)


def test_no_public_function_takes_more_than_seven_parameters():
    # a way to prune has so many parts, and each has its default
    most = {
        "secateur.pruner.Pruner": 8,
        "secateur.calibration.one_shot.oneshot": 10,
        "secateur.runtime.acceleration.accelerate": 8,
    }
    crowded = {}
    for path, thing in published().items():
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            continue
        if thing.__module__ == "secateur.cli":  # the options of a command have names, and nobody must give them all
            continue
        # progress=True draws a bar, processes=2 takes two processes: neither changes a result
        names = [name for name in signature(thing).parameters if name not in ("self", "progress", "processes")]
        # a frozen dataclass that holds results is read, not called
        if len(names) > most.get(path, 7) and not hasattr(thing, "__dataclass_fields__"):
            crowded[path] = names
    assert crowded == {}


def test_no_mutable_defaults():
    for path, thing in published().items():
        if not (inspect.isclass(thing) and issubclass(thing, BaseException)):
            for parameter in signature(thing).parameters.values():
                assert not isinstance(parameter.default, (list, dict, set)), path


@pytest.mark.parametrize("place", ["secateur", *MODULES])
def test_the_examples_run(place):
    torch.manual_seed(0)
    module = importlib.import_module(place)
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, "sc": sc})
    assert result.failed == 0


def test_there_are_examples_of_the_main_verbs():
    for verb in (sc.prune, sc.Pruner, sc.Masks, sc.weights, sc.report):
        assert ">>>" in verb.__doc__, verb


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_library_never_prints(source):
    if "cli" in source.parts or source.name in ("cli.py", "__main__.py"):
        return
    calls = [n for n in ast.walk(ast.parse(source.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"] == []
