"""Forwards in step with a captured one: what the results of their calls are, in short.

Results are not stored, but projected: three random sums of a tensor differ by as much as the tensors do, on average.
Dropout drops nothing here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from secateur.structure.calls import Run, key, numbers, results
from secateur.structure.calm import calm
from secateur.structure.fields import Shape
from secateur.structure.policy import relied_on
from secateur.structure.remains import Sizes
from secateur.support.inputs import Arguments

Print = tuple[float, ...]
"""How many numbers a tensor has, its length, and three random sums; zeros for integers, and for what has no values."""

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_DROPS = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), 1),
    **dict.fromkeys(_RECURRENT, 5),
    "scaled_dot_product_attention": 4,
    "multi_head_attention_forward": 10,
}
"""Where functions take the share that they drop."""


HIDING = frozenset(
    ["scaled_dot_product_attention", "clamp", "clip", "hardtanh", "threshold", "hardshrink", "softshrink"]
)
"""Functions whose numbers may not show in what they give: scales of few or small keys, bounds that nothing reaches."""


class Otherwise(Exception):
    """A call is not the expected one, or gives other sizes."""


class Trace(TorchFunctionMode):
    """A forward in step with a captured one.

    Attributes:
        at: how many of the captured calls it made.
        prints: of the results of each of these.
        numbers: Python numbers that each was given whose numbers may not show: see `HIDING`.
        out: what the model returned that callers rely on.
    """

    def __init__(self, run: Run, sizes: Sizes | None = None) -> None:
        """Follow a run; with `sizes`, as long as its calls are made with results of these."""
        super().__init__()
        self.run, self.calls, self.at = run, run.calls, 0
        self.prints: list[list[Print]] = []
        self.numbers: list[list[float]] = []
        self.out: list[Tensor] = []
        self._sizes = sizes

    def of(self, model: nn.Module, arguments: Arguments) -> Self:
        """Run a model.

        Raises:
            Otherwise: a call is not the expected one.
            Exception: whatever the model raises.
        """
        args, kwargs = arguments
        with calm(model, self.run.training, self):
            self.out = relied_on(model(*args, **kwargs))
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = key(func)
        args, kwargs = dropping_nothing(name, args, kwargs or {})
        out = func(*args, **kwargs)
        if outs := results(name, args, out):
            if self.ahead(name):
                self._check(outs)
                self.note(map(fingerprint, outs), (args, kwargs))
            elif self._sizes is not None and not name.startswith("get."):
                expected = self.calls[self.at].name if self.at < len(self.calls) else "the end"
                raise Otherwise(f"{name} instead of {expected}")
        return out

    def ahead(self, name: str) -> bool:
        """Whether the next of the captured calls is of this function."""
        return self.at < len(self.calls) and self.calls[self.at].name == name

    def note(self, prints: Iterable[Print], arguments: Any) -> None:
        """Take one step."""
        self.prints.append(list(prints))
        self.numbers.append(numbers(arguments) if self.calls[self.at].name in HIDING else [])
        self.at += 1

    def _check(self, outs: Sequence[Tensor]) -> None:
        want = None if self._sizes is None else self._sizes[self.at]
        if want is not None and not _fits(got := [tuple(t.shape) for t in outs], want):
            raise Otherwise(f"gives {got}, expected {want}")


def dropping_nothing(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with every share to drop set to zero."""
    at = _DROPS.get(name)
    if at is None:
        return args, dict(kwargs)
    if name in _RECURRENT and not isinstance(args[3], bool):
        at += 1  # packed sequences have their batch sizes in front
    if len(args) > at:
        args = (*args[:at], 0.0, *args[at + 1 :])
    return args, {k: 0.0 if k in ("p", "dropout_p") else v for k, v in kwargs.items()}


def _fits(got: Sequence[Shape], want: Sequence[Shape]) -> bool:
    pairs = zip(got, want, strict=True)
    return all(len(a) == len(b) and all(y in (x, -1) for x, y in zip(a, b, strict=True)) for a, b in pairs)


_CHUNK = 1 << 18


@functools.cache
def _random(device: torch.device) -> Tensor:
    return torch.randn(3, _CHUNK, generator=torch.Generator().manual_seed(1)).to(device)


def fingerprint(t: Tensor) -> Print:
    """The print of a tensor."""
    if t.is_meta or not (t.is_floating_point() or t.is_complex()):  # what numbers choose is as right as they are
        return (0.0,) * 5
    t = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    v = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten().float()
    found = _sums(v)
    if not math.isfinite(found[0]):  # masks of -inf, or of the least number of a type
        found = _sums(torch.where(v.abs() < 1e15, v, 0))
    return (float(v.numel()), *found)


def prints_apart(a: Print, b: Print) -> float:
    """The difference between two tensors relative to the length of the first, as their prints tell."""
    if a[0] != b[0]:
        return math.inf
    return max(abs(x - y) for x, y in zip(a[1:], b[1:], strict=True)) / max(a[1], 1e-12)


def _sums(v: Tensor) -> Print:
    random = _random(v.device)
    whole, rest = divmod(v.numel(), _CHUNK)
    sums = torch.mv(random[:, :rest], v[whole * _CHUNK :] if whole else v)
    if whole:  # each chunk times another random number
        sums = sums + ((random @ v[: whole * _CHUNK].view(whole, _CHUNK).T) * random[:, :whole]).sum(1)
    return (math.sqrt(float(torch.dot(v, v))), *sums.tolist())
