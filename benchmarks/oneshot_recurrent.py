"""The sections of benchmarks/oneshot.py on recurrent layers: speakers told apart by an LSTM, words said by GRUs.

- speaker: ID is the share of utterances whose nearest speaker is theirs, EER the equal error rate over all pairs (lower
  is better), both of the pruned model with its own embeddings. It is calibrated on other utterances than it is tested
  on; "unseen" calibrates on other speakers too. What magnitude, Wanda and SparseGPT leave stands beside it.
- gru: the share of words of which each phoneme is right, over that of the dense model.

Speech and words are in oneshot_speech.py and oneshot_spelling.py.
"""

from __future__ import annotations

import copy
import time
from typing import Any, Protocol

import torch
from torch import nn

import oneshot_speech as speech
import oneshot_spelling as spelling
import secateur as sc

GOALS: dict[tuple[str, str, str], tuple[float, float | None]] = {
    ("speaker", "ID, 80 %", "full"): (0.93, 0.945),
    ("speaker", "EER, 80 %", "full"): (0.16, 0.14),
    ("speaker", "ID, 90 %", "full"): (0.86, 0.92),
    ("speaker", "EER, 90 %", "full"): (0.25, 0.19),
    ("gru", "50 %, of dense", "full"): (0.90, 0.95),
    ("gru", "80 %, of dense", "full"): (0.62, 0.72),
}
"""What must be reached and what is aimed at: by section, what is measured, and side. EER must be as low, or lower."""


class Figures(Protocol):
    """Where figures go."""

    def add(self, what: str, side: str, value: float, seconds: float | None = None) -> None:
        """One draw of what is measured, and CPU seconds."""


class Settings(Protocol):
    """What was asked for."""

    @property
    def draws(self) -> int: ...
    @property
    def quick(self) -> bool: ...


SIDES: dict[str, dict[str, Any]] = {
    "wanda": {"solver": "wanda"},
    "sparsegpt": {"solver": "sparsegpt"},
    "fast": {"effort": "fast"},
    "full": {},
}


def speaker(book: Figures, asked: Settings) -> None:
    """The speaker LSTM, on seen and on unseen speakers."""
    dense = speech.speaker_encoder()
    for draw in range(asked.draws):
        for unseen in (False,) if asked.quick else (False, True):
            data = speech.speakers(draw, unseen)
            where = "unseen, " if unseen else ""
            for kind, value in data.judged(dense).items():
                book.add(f"{where}{kind}", "dense", value)
            start = time.process_time()
            stats = sc.calibrate(dense, data.calibration.split(64))
            book.add(f"{where}windows to calibrate", "calibrate", len(data.calibration), time.process_time() - start)
            for sparsity in (0.8,) if asked.quick else (0.8, 0.9):
                for side in ("magnitude", "full") if unseen else ("magnitude", *SIDES):
                    model, seconds = _pruned(dense, stats, sparsity, side)
                    for kind, value in data.judged(model).items():
                        book.add(f"{where}{kind}, {sparsity:.0%}".replace("%", " %"), side, value, seconds)


def gru(book: Figures, asked: Settings) -> None:
    """The GRUs that say words."""
    dense = spelling.speller()
    for draw in range(asked.draws):
        data = spelling.words(dense, draw)
        whole = data.judged(dense)
        book.add("words that are right", "dense", whole)
        stats = sc.calibrate(dense, data.calibration)
        for sparsity in (0.8,) if asked.quick else (0.5, 0.8):
            for side in ("magnitude", *SIDES):
                model, seconds = _pruned(dense, stats, sparsity, side)
                book.add(f"{sparsity:.0%}, of dense".replace("%", " %"), side, data.judged(model) / whole, seconds)


def _pruned(dense: nn.Module, stats: Any, sparsity: float, side: str) -> tuple[Any, float]:
    """A copy, pruned in its recurrent layers, and CPU seconds."""
    model = copy.deepcopy(dense)
    scope = sc.weights(model, only=["*_l[0-9]*"])
    start = time.process_time()
    with torch.no_grad():
        if side == "magnitude":
            sc.prune(model, sparsity, scope=scope)
        else:
            sc.oneshot(model, stats, sparsity, scope=scope, **SIDES[side])
    return model, time.process_time() - start
