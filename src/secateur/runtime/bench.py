"""What `secateur bench` does: a model of the user's is built, filled, accelerated and measured on this machine."""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest
from secateur.measurement.timing import Comparison, compare
from secateur.runtime.acceleration import accelerate, explain
from secateur.runtime.kernel_plans import KernelPlan
from secateur.storage import load
from secateur.support import checks
from secateur.support.files import StrPath

BOUND = 100
"""Random integers are below this, so that they are words of any vocabulary, unless the input says another bound."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}
_SPELLING = "give sizes such as 1x784, or with a dtype 1x128:int64, or with a bound too 1x128:int64:2"


@dataclass(frozen=True)
class Trial:
    """What was chosen for each layer, and the model before and after, measured side by side."""

    explanation: KernelPlan
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Both as plain data, for JSON: explanation, comparison."""
        return {"explanation": self.explanation.to_dict(), "comparison": self.comparison.to_dict()}

    def __str__(self) -> str:
        return f"{self.explanation}\n\n{self.comparison}"


def run(
    target: str,
    inputs: Sequence[str],
    *,
    checkpoint: StrPath | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
) -> Trial:
    """Accelerate a model and measure what that gained.

    Args:
        target: MODULE:FACTORY, as of `model_of`.
        inputs: as of `input_of`, one for each positional argument of the model.
        checkpoint: what `sc.load` reads; without it the model has the weights that the factory gives it.
        threads: CPU threads; by default as many as torch has now.
        seconds: about how long each of the two models is timed.

    Raises:
        InputError, InputTypeError, UnknownNameError: as of `model_of`, `input_of`, `sc.load` and `sc.compare`; or the
            model does not run on these inputs.
    """
    generator = torch.Generator().manual_seed(0)
    given = tuple(input_of(spelled, generator) for spelled in inputs)
    model = model_of(target).eval()
    if checkpoint is not None:
        load(checkpoint, into=model)
    try:
        with torch.inference_mode():
            model(*given)
    except Exception as error:  # whatever a model says of inputs that it does not take
        raise InputError(
            f"{target} does not run on inputs {', '.join(inputs)} ({type(error).__name__}: {error}): give an --input "
            "of the right shape and dtype for each positional argument of its forward"
        ) from error
    fast = accelerate(model, given, threads=threads)
    comparison = compare({"dense": model, "fast": fast}, given, threads=threads, seconds=seconds)
    return Trial(explain(fast), comparison)


def model_of(target: str) -> nn.Module:
    """Build the model that MODULE:FACTORY names.

    Args:
        target: MODULE is imported, from the current folder or from what is installed; FACTORY is called without
            arguments. It may be a class, a function, a name with dots, or a module that is there already.

    Raises:
        InputError: it is spelled otherwise, or there is no such module. UnknownNameError: MODULE has no such name.
        InputTypeError: it is not callable, wants arguments, or gives something else than a module.
    """
    found = named(target, "MODULE:FACTORY", "models:build, for build() of models.py")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputTypeError(f"{target} is {checks.kind(found)}, not callable: give a function that makes a model")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InputTypeError(f"{target} cannot be called without arguments ({error}): wrap it in a function") from None
    except ValueError:  # what is built in may have no signature
        pass
    model = found()
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{target} gave {checks.kind(model)}, not an nn.Module: let it return the model")
    return model


def named(target: str, form: str, example: str) -> Any:
    """Import what MODULE:NAME names, from the current folder or from what is installed.

    Args:
        target: NAME may have dots.
        form: how it is spelled, for messages.
        example: of a target and what it means, for messages.

    Raises:
        InputError: it is spelled otherwise, or there is no such module. UnknownNameError: MODULE has no such name.
    """
    place, _, name = target.partition(":")
    if not place or not name:
        raise InputError(f"{target!r} is not {form}: give for example {example}")
    return _attribute(_imported(place), name, target)


def input_of(spelled: str, generator: torch.Generator) -> Tensor:
    """Make a random tensor: normal numbers, or whole ones from 0 below a bound.

    Args:
        spelled: "1x784" is float32 [1, 784]; "1x128:int64" holds whole numbers below 100, "1x128:int64:2" below 2.

    Raises:
        InputError: it is spelled otherwise.

    >>> input_of("2x3", torch.Generator()).shape, int(input_of("64:int64:5", torch.Generator()).max())
    (torch.Size([2, 3]), 4)
    """
    sizes, *rest = spelled.split(":")
    if len(rest) > 2 or not all(_is_count(size) for size in sizes.split("x")):
        raise InputError(f"{spelled!r} is not a shape: {_SPELLING}")
    shape = [int(size) for size in sizes.split("x")]
    dtype = _DTYPES.get(rest[0] if rest else "float32")
    if dtype is None:
        raise InputError(f"{spelled!r} has no dtype secateur makes inputs of: choose {', '.join(_DTYPES)}")
    if len(rest) == 2 and (dtype.is_floating_point or not _is_count(rest[1])):
        raise InputError(f"{spelled!r} has no bound: only whole numbers have one, of 1 or more; {_SPELLING}")
    if math.prod(shape) * dtype.itemsize >= 1 << 40:
        raise InputError(f"{spelled!r} is over a terabyte: {_SPELLING}")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(int(rest[1]) if len(rest) == 2 else BOUND, shape, generator=generator, dtype=dtype)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def _imported(place: str) -> Any:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # a module that the user's own imports
        raise InputError(
            f"there is no module named {error.name!r} here or installed: give MODULE as in `import MODULE`, "
            "without .py, and run this in its folder"
        ) from None
    except TypeError:  # a relative name
        raise InputError(f"{place!r} is not the name of a module: give MODULE as in `import MODULE`") from None


def _attribute(module: Any, name: str, target: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        there = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UnknownNameError(f"{target}: that module has no {name}; {nearest(name, there)}") from None
