"""What an argument must be, in one sentence."""

from pathlib import Path

import pytest

from secateur.errors import InputError, InputTypeError
from secateur.support import checks


def test_what_fits_passes():
    checks.whole("n", 3)
    checks.whole("n", 2, 2)
    checks.number("rate", 0.5, "a rate")
    checks.flag("progress", False)
    checks.function("loss", len, "a function")
    checks.several("batches", iter([1]), "batches")
    checks.threads(None)
    checks.threads(2)
    assert checks.path("path", "a/b") == checks.path("path", Path("a/b")) == Path("a/b")


@pytest.mark.parametrize(
    ("call", "error", "remedy"),
    [
        (lambda: checks.whole("n", True), InputTypeError, "n is True: give a whole number"),
        (lambda: checks.whole("n", 2.0), InputTypeError, r"n is 2\.0: give a whole number"),
        (lambda: checks.whole("n", 1, 2), InputError, "n is 1: give 2 or more"),
        (lambda: checks.number("rate", "a", "a rate"), InputTypeError, "rate is 'a': give a rate"),
        (lambda: checks.number("rate", True, "a rate"), InputTypeError, "rate is True: give a rate"),
        (lambda: checks.flag("progress", 1), InputTypeError, "progress is 1: give True or False"),
        (lambda: checks.function("loss", [1], "a function"), InputTypeError, "loss is a list: give a function"),
        (lambda: checks.several("batches", {}, "batches"), InputTypeError, "batches is a dict: give batches"),
        (lambda: checks.several("batches", list, "batches"), InputTypeError, "batches is a type: give batches"),
        (lambda: checks.threads(0), InputError, "threads is 0: give a number of CPU threads"),
        (lambda: checks.path("dst", b"x"), InputTypeError, "dst is b'x': give a path"),
    ],
)
def test_what_does_not_is_named_with_the_remedy(call, error, remedy):
    with pytest.raises(error, match=remedy):
        call()
