"""The names of the package are imported when they are used, and are those that `__all__` lists."""

import subprocess
import sys

import pytest

import secateur as sc
from secateur import public_names


def ran(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_each_name_of_all_is_there():
    assert {name: getattr(public_names, name) for name in sc.__all__} == {n: getattr(sc, n) for n in sc.__all__}


@pytest.mark.parametrize("first", ["secateur", "secateur.cli", "secateur.support.tables"])
def test_torch_is_not_imported_before_it_is_needed(first):
    assert ran(f"import sys, {first}; print('torch' in sys.modules)") == ["False"]


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_line_says_what_it_is_without_torch(option):
    without_torch = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = ['{option}']"
    assert "secateur" in ran(f"{without_torch}; from secateur.cli import main; main()")


@pytest.mark.parametrize("name", ["prune", "scores", "dropout", "plan"])
def test_a_name_or_a_room_is_imported_when_it_is_first_used(name):
    assert ran(f"import secateur as sc; print(sc.{name}.__name__.rpartition('.')[2])") == [name]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'prunes'"):
        sc.prunes


def test_everything_is_listed():
    assert {*sc.__all__, "scores", "__version__"} <= set(dir(sc))
