"""Tensors of bits that are seldom seen."""

import math

import numpy as np
import torch

from secateur.storage.dtypes import KINDS, words_of

FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16


def words(dtype, size, sparsity, seed=0):
    """Bits of `size` elements, many of them odd: minus zero, subnormals, infinities, NaN with a payload."""
    rng, kind = np.random.default_rng(seed), KINDS[dtype]
    bits, count = 8 * kind.word.itemsize, size * kind.parts
    found = np.frombuffer(rng.bytes(count * kind.word.itemsize), kind.word).copy()
    odd = [1 << (bits - 1), 1, 3, (1 << bits) - 1, (1 << (bits - 1)) - 1]
    if dtype in FLOATS:
        odd += words_of(torch.tensor([math.inf, -math.inf, math.nan]).to(dtype)).tolist()
    some = rng.random(count) < 0.1
    found[some] = rng.choice(np.array(odd, kind.word), some.sum())
    found[rng.random(count) < sparsity] = 0
    return found & kind.word.type(1) if dtype is torch.bool else found


def tensor(found, dtype):
    """The tensor that such words are."""
    return torch.from_numpy(found.view(np.uint8)).view(dtype) if found.size else torch.empty(0, dtype=dtype)
