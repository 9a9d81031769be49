"""How a pruner begins a training, or goes on with one, and which changes of its masks go into a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.errors import InputTypeError, MaskError, StateError, listed
from secateur.masks import check
from secateur.pruner import Pruner
from secateur.support import checks

_LEAST = 0.01
"""A change of the sparsity by less is told together with the next ones: masks may change at each of many steps."""


def given(pruner: object) -> Pruner:
    """See that a callback was given a Pruner.

    Raises:
        InputTypeError: it was not.
    """
    if not isinstance(pruner, Pruner):
        raise InputTypeError(f"pruner is {checks.kind(pruner)}: give a secateur.Pruner, PruningCallback(pruner)")
    return pruner


def begin(pruner: Pruner, saved: Mapping[str, Any] | None) -> None:
    """Make a pruner ready to be attached: detached, at its first step, or where `saved` stopped.

    Raises:
        StateError: it is in the middle of another training, and there is no `saved`.
        InputError: `saved` is of another run. MaskError: the weights that were loaded are of another run.
    """
    pruner.detach()  # of a training that was interrupted
    if saved is None and pruner.steps and not pruner.done:
        raise StateError(
            f"{pruner!r} is in the middle of another training: go on from a checkpoint of that, or make a new Pruner "
            "for a new training"
        )
    if saved is not None:
        pruner.load_state_dict(saved)
        back = check(pruner.model, pruner.masks)
        if back:
            raise MaskError(
                f"the saved pruner is of another run than the weights: {listed([*back])} is not zero where it pruned. "
                "Give the pruner that was saved with these weights"
            )


def worth_telling(pruner: Pruner, told: float) -> bool:
    """Whether the sparsity is another one than that told last: by a hundredth, or because it has come to its end."""
    return abs(pruner.sparsity - told) >= _LEAST or (pruner.done and pruner.sparsity != told)
