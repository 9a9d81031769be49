"""Random numbers for samples: those of sample `i` follow from the seed and from `i`, whatever else is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Streams:
    """One generator a sample and device, each read from its start on.

    Args:
        seed: of all samples.
        samples: their indices.
    """

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        self.samples = samples
        self._seed = seed
        self._generators: dict[torch.device, list[torch.Generator]] = {}

    def draw(self, shape: Sequence[int], device: torch.device, *, normal: bool = False) -> Tensor:
        """Draw numbers in [0, 1), or standard normal ones, for each sample: float32 `[samples, *shape]`."""
        numbers = torch.empty((len(self.samples), *shape), dtype=torch.float32, device=device)
        generators = self._on(device)
        for row, generator in zip([numbers] if len(generators) == 1 else numbers.unbind(), generators, strict=True):
            if normal:
                row.normal_(generator=generator)
            else:
                row.uniform_(generator=generator)
        return numbers

    def _on(self, device: torch.device) -> list[torch.Generator]:
        if device not in self._generators:
            seeds = (_seed(self._seed, sample) for sample in self.samples)
            self._generators[device] = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return self._generators[device]


def _seed(seed: int, sample: int) -> int:
    """Mix both, so that neighbours have nothing in common: the generator of the CPU takes 32 bits as they are."""
    digest = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
