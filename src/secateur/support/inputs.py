"""How a model is called: with a tensor, a tuple of positional or a dict of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError, InputTypeError
from secateur.support import checks

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


def arguments(inputs: Any, meta: bool = False) -> Arguments:
    """How to call a model with a tensor, a tuple of positional or a dict of keyword arguments.

    Args:
        inputs: of the model.
        meta: whether they may be on the meta device.

    Raises:
        InputTypeError: inputs of another type. InputError: a tensor on the meta device.

    >>> arguments((1, 2)), arguments({"x": 3})
    (((1, 2), {}), ((), {'x': 3}))
    """
    if not meta and any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(inputs)):
        raise InputError("inputs are on the meta device and hold no values: give tensors on the device of the model")
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor | PackedSequence):  # the latter is a tuple, but one argument
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    loader = " A DataLoader gives lists: (tuple(batch) for batch in loader), without labels." * isinstance(inputs, list)
    raise InputTypeError(
        f"inputs is {checks.kind(inputs)}: it is not clear how to call a model with it. "
        "Pass a tensor, a tuple of positional arguments, or a dict of keyword arguments." + loader
    )


def given(call: Arguments) -> Any:
    """What `arguments` made a call of; a tuple of one thing comes back as that.

    >>> given(arguments((1, 2))), given(arguments({"x": 3}))
    ((1, 2), {'x': 3})
    """
    args, kwargs = call
    return kwargs or (args[0] if len(args) == 1 else args)
