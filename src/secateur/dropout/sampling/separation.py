"""Whether samples that are folded into the batch stay apart, told by the sizes of what each call takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sized(NamedTuple):
    """A call of a pass, behind the first dropout.

    Attributes:
        func: what is called.
        taken: elements of each tensor among the arguments.
        given: elements of each tensor among the results.
    """

    func: Callable[..., Any]
    taken: list[int]
    given: list[int]

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Sized:
        """Take note of a call."""
        taken = list(_sizes(args))
        if kwargs:
            taken += _sizes(kwargs)
        return cls(func, taken, [result.numel()] if isinstance(result, Tensor) else list(_sizes(result)))


def separate(one: Sequence[Sized], several: Sequence[Sized], samples: int) -> bool:
    """Tell whether a folded pass makes the calls of a pass of one sample, each with so many times as much.

    A call that takes what has grown with the samples and gives what has not, such as a maximum of the whole batch,
    mixes them. It may do so for rare values only, so comparing some samples is not enough. What mixes them and gives
    as much as it takes (a softmax along the batch) does so for any values: there comparing is enough.

    Args:
        one: calls of a pass of one sample.
        several: calls of the folded pass.
        samples: of the folded pass.
    """
    if len(one) != len(several):
        return False
    for alone, folded in zip(one, several, strict=True):
        if alone.func != folded.func or len(alone.taken) != len(folded.taken):
            return False
        if alone.taken == folded.taken or alone.func in _BLIND:
            continue
        if [samples * size for size in alone.given] != folded.given or 0 in alone.given:  # 0 times more shows nothing
            return False
    return True


_BLIND = {
    Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros, Tensor.to, Tensor.type_as,
    torch.result_type, torch.can_cast,
}  # fmt: skip
"""Functions that take no more than type and device of a tensor."""


def _sizes(things: Any) -> Iterator[int]:
    if isinstance(things, Tensor):
        yield things.numel()
    elif isinstance(things, (list, tuple)):
        for thing in things:
            yield from _sizes(thing)
    elif isinstance(things, dict):
        yield from _sizes(list(things.values()))
