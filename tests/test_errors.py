"""secateur.errors: one tree; each error is also the built-in one that a caller would expect."""

import inspect
import pickle

import pytest

from secateur import errors
from secateur.errors import SecateurError, SecateurWarning, UnknownNameError, nearest

TREE = {
    "InputError": ValueError,
    "FileError": ValueError,
    "NotFiniteError": ValueError,
    "InputTypeError": TypeError,
    "UnknownNameError": KeyError,
    "MaskError": ValueError,
    "PatternError": ValueError,
    "StructureError": RuntimeError,
    "StateError": RuntimeError,
    "GroupError": RuntimeError,
    "WriteError": OSError,
}


def test_the_tree_is_whole():
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    raised = {name for name, c in classes.items() if issubclass(c, SecateurError) and c is not SecateurError}
    assert raised == set(TREE)
    assert issubclass(SecateurWarning, UserWarning)
    assert all(name in errors.__doc__ for name in [*TREE, "SecateurError", "SecateurWarning"])


@pytest.mark.parametrize(("name", "built_in"), TREE.items())
def test_each_is_also_a_built_in(name, built_in):
    error = getattr(errors, name)
    assert issubclass(error, SecateurError)
    assert issubclass(error, built_in)
    assert str(error("what, why, remedy")) == "what, why, remedy"
    assert error.__doc__
    again = pickle.loads(pickle.dumps(error("what")))
    assert type(again) is error
    assert str(again) == "what"


@pytest.mark.parametrize("name", TREE)
def test_a_remedy_for_python_alone_ends_the_message(name):
    error = getattr(errors, name)("ask for less", in_python=", or say so=True\x07")
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == r"ask for less, or say so=True\x07"
    assert str(again).removesuffix(again.in_python) == "ask for less"


def test_unknown_name_prints_no_quotes():
    assert str(UnknownNameError("no 'x'; try 'y'")) == "no 'x'; try 'y'"
    assert str(UnknownNameError()) == ""


def test_nearest():
    names = ["encoder.weight", "decoder.weight", "head.weight"]
    assert nearest("encodr.weight", names).startswith("the nearest names are: encoder.weight")
    assert nearest("*encoder*", names).startswith("the nearest names are: encoder.weight")
    assert nearest("zzz", names) == "valid names are: " + ", ".join(names)
    assert nearest("zzz", map(str, range(9))) == "valid names are: 0, 1, 2, 3, 4 and 4 more"
    assert nearest("zzz", []) == "there are none to choose from"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("layer.0 weight é 中", "layer.0 weight é 中"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\r\tc\x85\u2028", r"a\nb\r\tc\x85\u2028"),
        ("\u202ea\u2066b\u200f\ufeff", r"\u202ea\u2066b\u200f\ufeff"),
        ("\ud800\U000e0001", r"\ud800\U000e0001"),
        ("a\u3164b\u2800c\ufe0fd\U000e0101", r"a\u3164b\u2800c\ufe0fd\U000e0101"),
    ],
)
def test_printable(text, want):
    assert errors.printable(text) == want
