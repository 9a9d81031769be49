"""Amounts as people write them: a fraction, a count of weights, or a fraction for each glob; read exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Rational, Real

import numpy as np
from torch import Tensor

from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest
from secateur.support import checks


@dataclass(frozen=True)
class Count:
    """A number of weights to prune, instead of a fraction: `sc.prune(model, sc.Count(1))` prunes one."""

    weights: int

    def __post_init__(self) -> None:
        if isinstance(self.weights, bool) or not isinstance(self.weights, int) or self.weights < 0:
            raise InputError(f"Count({self.weights!r}): give a whole number of weights, 0 or more")


Sparsity = float | Fraction | Tensor | Count | Mapping[str, float]
"""What a user may ask for: a fraction, a `Count`, or `{glob: fraction}`."""


def fraction(sparsity: object) -> Fraction:
    """Read a sparsity exactly as written: 0.145 is 145/1000, not the nearest binary fraction.

    Raises:
        InputTypeError: the int 1 (or any other), which could mean a fraction or a count.
        InputError: anything that is no number between 0 and 1.
    """
    if isinstance(sparsity, Tensor) and sparsity.ndim == 0 and sparsity.is_floating_point():
        sparsity = sparsity.detach().cpu().float().numpy()[()] if sparsity.itemsize <= 4 else sparsity.item()
    remedy = "give the fraction of weights that become zero, 0.0 <= sparsity <= 1.0, such as 0.9"
    if isinstance(sparsity, (bool, np.bool_, str)) or not isinstance(sparsity, (Real, np.floating)):
        raise InputError(f"sparsity is {sparsity!r}, {checks.kind(sparsity)}: {remedy}")
    if isinstance(sparsity, (int, np.integer)):
        raise InputTypeError(
            f"sparsity is the int {sparsity!r}, which could mean two things: write {_meant(int(sparsity))}, "
            f"or sc.Count({int(sparsity)}) for a number of weights"
        )
    if not isinstance(sparsity, Rational) and not math.isfinite(float(sparsity)):
        raise InputError(f"sparsity is {sparsity!r}: {remedy}")
    exact = Fraction(sparsity) if isinstance(sparsity, Rational) else Fraction(str(sparsity))
    if 2 <= exact <= 100:
        raise InputError(f"sparsity is {sparsity!r}, outside 0 to 1: write {_meant(exact)}")
    if not 0 <= exact <= 1:
        raise InputError(f"sparsity is {sparsity!r}, outside 0 to 1: {remedy}")
    return exact


def _meant(amount: int | Fraction) -> str:
    """The fraction that somebody meant who wrote a number from 2 to 100 (a percentage), or 0 or 1."""
    if 2 <= amount <= 100:
        return f"{float(amount) / 100:g} for {float(amount):g} %"
    if amount in (0, 1):
        return f"{float(amount)!r} for a fraction of all weights (1.0 needs allow_empty=True)"
    return "a fraction such as 0.9"


def half_up(value: Fraction) -> int:
    """Round to the nearest integer, halves up: floor(value + 1/2)."""
    return math.floor(value + Fraction(1, 2))


def explicit(
    sparsities: Mapping[str, object], names: Sequence[str], aliases: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Fraction]:
    """Give each name the sparsity of the last glob that matches it; names that none matches are left out.

    Args:
        sparsities: by glob.
        names: of the tensors in scope.
        aliases: the other names of a tied tensor, by which it may go too.

    Raises:
        UnknownNameError: a glob that matches no tensor in scope.
    """
    found: dict[str, Fraction] = {}
    every = {name: (name, *(aliases or {}).get(name, ())) for name in names}
    for pattern, sparsity in sparsities.items():
        if not isinstance(pattern, str):
            raise InputTypeError(f"{pattern!r} names no tensor: write a sparsity for each as {{'encoder.*': 0.9}}")
        matched = [
            name
            for name, known in every.items()
            if any(fnmatchcase(one, pattern) or one.startswith(f"{pattern}.") for one in known)
        ]
        if not matched:
            raise UnknownNameError(f"{pattern!r} matches no tensor in scope; {nearest(pattern, names)}")
        found.update(dict.fromkeys(matched, fraction(sparsity)))
    return {name: found[name] for name in names if name in found}
