"""How much each matrix of a model loses, by what its zeros cost the whole model: measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from secateur.calibration.matrices import Matrix
from secateur.calibration.sensitivity import Scan
from secateur.calibration.ways import Solution

LEVELS = (0.3, 0.5, 0.7, 0.85, 0.93, 0.97)
"""Sparsities at which the loss of each matrix alone is computed."""

ROUNDS = 2
_GRID = np.arange(1, 100) / 100
_LEAST = 1e-6

Solve = Callable[[Matrix, int], Solution]
Quality = Callable[[Sequence[Solution]], float]


def measurements(parts: Sequence[Matrix]) -> int:
    """Qualities that `zeros` measures and tells of, each with a forward of all batches to check on."""
    return len(parts) * (1 + ROUNDS)


def zeros(
    even: Mapping[Matrix, int],
    solve: Solve,
    quality: Quality,
    advance: Callable[[float], None] = lambda done: None,
) -> dict[Matrix, int]:
    """Share the zeros among matrices so that the whole model loses least.

    What a matrix costs the model is taken to be its stake times its own noise, which is known at each level. The stake
    is measured: first with each matrix alone pruned, then in rounds with all pruned but one, since errors meet. Then
    the last weight of each matrix costs the same (Lagrange's condition).

    Args:
        even: zeros of each of the matrices, which add up to the total.
        solve: prunes one of them, and must be quick.
        quality: of the model with some of them pruned, the others dense; higher is better.
        advance: called with the qualities that were measured: len(even) in each of `1 + ROUNDS` rounds.
    """
    parts, count = list(even), sum(even.values())
    curves = {part: [_noise(part, solve(part, round(part.size * level))) for level in LEVELS] for part in parts}
    dense, stakes, counts = quality([]), {}, dict(even)
    for part in parts:
        alone = solve(part, counts[part])
        stakes[part] = max(dense - quality([alone]), _LEAST) / _noise(part, alone)
        advance(1)
    counts = _cheapest(stakes, curves, count)
    for _ in range(ROUNDS):
        solved = {part: solve(part, counts[part]) for part in parts}
        together, met = quality(list(solved.values())), {}
        for part in parts:
            gain = quality([one for other, one in solved.items() if other is not part]) - together
            met[part] = max(gain, _LEAST) / _noise(part, solved[part])
            advance(1)
        scale = sum(stakes.values()) / sum(met.values())
        stakes = {part: (stakes[part] * met[part] * scale) ** 0.5 for part in parts}
        counts = _cheapest(stakes, curves, count)
    return counts


def _noise(part: Matrix, solution: Solution) -> float:
    """The energy of the error over that of what is left of the output: what layers of normalisation let through."""
    lost = min(part.loss(solution[1]), 1 - _LEAST)
    return max(lost / (1 - lost), _LEAST)


def _cheapest(
    stakes: Mapping[Matrix, float], curves: Mapping[Matrix, Sequence[float]], count: int
) -> dict[Matrix, int]:
    """The zeros of each matrix, `count` in all, that cost least together."""
    names = {str(i): part for i, part in enumerate(stakes)}
    costs = {name: tuple(-stakes[part] * _between(curves[part])) for name, part in names.items()}
    sizes = {name: part.size for name, part in names.items()}
    scan = Scan(tuple(_GRID), 0.0, (0.0,) * len(_GRID), costs, sizes, {})
    counts = scan.share({name: torch.empty(size, device="meta") for name, size in sizes.items()}, count)
    return {names[name]: n for name, n in counts.items()}


def _between(noises: Sequence[float]) -> npt.NDArray[np.float64]:
    """The noise on the grid: its logarithm is a line between levels, and goes on beyond, over that of the odds."""
    x, y = np.log(np.divide(LEVELS, np.subtract(1, LEVELS))), np.log(noises)
    at = np.log(_GRID / (1 - _GRID))
    first, last = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    found = np.interp(at, x, y) + np.minimum(at - x[0], 0) * first + np.maximum(at - x[-1], 0) * last
    return np.asarray(np.exp(found), np.float64)
