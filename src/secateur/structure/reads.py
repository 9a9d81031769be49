"""Two models that should make the same calls of the same tensors: one without some blocks, and one that passes them by.

Calls that read no tensor of a model are not compared: code around blocks may make masks for some of them only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.structure.calls import key, results, tensors
from secateur.structure.calm import calm
from secateur.structure.policy import relied_on
from secateur.structure.proof import DRAWS, tolerance
from secateur.structure.traces import Print, fingerprint, prints_apart
from secateur.support.inputs import Arguments


@dataclass
class Named:
    """A model, and names of its tensors, by id.

    Attributes:
        unread: names of its parameters that no forward has read so far.
    """

    model: nn.Module
    names: Mapping[int, str]
    unread: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unread = {self.names[id(p)] for p in self.model.parameters() if id(p) in self.names}


class _Reads(TorchFunctionMode):
    """Notes which tensors of a model each call reads, and takes prints of its results.

    Attributes:
        draws: whether numbers were drawn, other than for dropout.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[tuple[str, list[Print]]] = []
        self.read: set[str] = set()
        self.draws = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, operands = key(func), tensors((args, kwargs or {}))
        out = func(*args, **kwargs or {})
        read = [self.names[id(t)] for t in operands if id(t) in self.names]
        self.draws = self.draws or name in DRAWS
        self.read.update(() if name.startswith("get.") else read)
        if read and (outs := results(name, args, out)):
            self.calls.append((f"{name} of {', '.join(read)}", [*map(fingerprint, outs)]))
        return out


def strays(one: Named, other: Named, arguments: Arguments, training: bool = False) -> str:
    """Where two models first differ that should make the same calls of the same tensors; empty if nowhere.

    Args:
        one, other: the models; what is the same tensor in both has one name.
        arguments: of the forward.
        training: in which mode; where numbers are drawn in training, these may be others, and nothing is compared.

    Returns what differs, in words.
    """
    (reads, want), (others, got) = _read(one, arguments, training), _read(other, arguments, training)
    if training and reads.draws:
        return ""
    first, second = reads.calls, others.calls
    limit = tolerance(one.model)
    for (a, before), (b, after) in zip_longest(first, second, fillvalue=("the end", [])):
        if a != b:
            return f"{b} comes in place of {a}"
        if len(before) != len(after) or max(map(prints_apart, before, after), default=0.0) > limit:
            return f"{a} gives other numbers"
    if len(want) != len(got):
        return f"there are {len(got)} outputs in place of {len(want)}"
    worst = max((prints_apart(fingerprint(a), fingerprint(b)) for a, b in zip(want, got, strict=True)), default=0.0)
    if worst > limit:
        return f"the outputs differ by {worst:.1e}"
    whole = [(a, b) for a, b in zip(want, got, strict=True) if not (a.is_floating_point() or a.is_complex())]
    return "" if all(torch.equal(a, b) for a, b in whole) else "the outputs differ"


def _read(one: Named, arguments: Arguments, training: bool) -> tuple[_Reads, Sequence[Tensor]]:
    args, kwargs = arguments
    reads = _Reads(one.names)
    with calm(one.model, training, reads):
        out = one.model(*args, **kwargs)
    one.unread -= reads.read
    return reads, relied_on(out)
