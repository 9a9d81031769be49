"""Made the files in `golden/`, once: `python tests/storage/make_golden.py`.

Files of version 1 stay for good: whoever reads packed files reads these, whatever comes after. So this is not run
again; a later version gets files of its own, beside these. The values are made by arithmetic, so that the tests can
make them again on any machine and with any torch.
"""

from pathlib import Path

import numpy as np
import torch

import secateur as sc
from secateur.storage.dtypes import KINDS, name_of

FOLDER = Path(__file__).parent / "golden"
LOSSY = torch.float64, torch.float32, torch.float16, torch.bfloat16
SAVED = {
    "fp16": {"level": "fp16", "effort": "fast"},
    "bf16": {"level": "bf16", "effort": "best"},
    "near": {"level": "near"},
    "small": {"level": "small"},
    "tiny": {"level": "tiny"},
    "step": {"step": 0.3},
}


def noise(count, salt):
    """Whole numbers of 64 bits that look random."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    for shift in (30, 27, 31):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def of_bits(words, dtype, shape):
    """The tensor of a dtype that has the lowest bits of these words."""
    narrow = words.astype(KINDS[dtype].word)
    narrow = narrow & narrow.dtype.type(1) if dtype is torch.bool else narrow
    return torch.from_numpy(narrow.view(np.uint8)).view(dtype).reshape(shape)


def dense(dtype, salt):
    """Few zeros, of either sign, and so few numbers that packing is worth it."""
    bits = 8 * KINDS[dtype].word.itemsize
    random = noise(400 * KINDS[dtype].parts, salt)
    words = (random % 2) << np.uint64(bits - 1) | np.uint64(0x3 << (bits - 4)) | (random >> np.uint64(8)) % 4 | 1
    return of_bits(np.where(random % 37 == 0, np.uint64(0), words), dtype, (20, 20))


def sparse(dtype, salt):
    """Any bits at all, between many zeros; minus zero among them."""
    random = noise(300 * KINDS[dtype].parts, salt)
    words = noise(300 * KINDS[dtype].parts, salt + 1)
    words[::41] = 1 << (8 * KINDS[dtype].word.itemsize - 1)
    return of_bits(np.where(random % 10 < 7, np.uint64(0), words), dtype, (300,))


def few(dtype, salt):
    """Too few to pack."""
    return of_bits(noise(3 * KINDS[dtype].parts, salt), dtype, (3,))


def lossless():
    """Each dtype in each form, tied and empty tensors, scalars, names of all kinds."""
    state = {}
    for salt, dtype in enumerate(KINDS):
        for make in (dense, sparse, few):
            state[f"{name_of(dtype)}.{make.__name__}"] = make(dtype, 1000 * salt)
    state["tied"] = state["float32.dense"]
    state["also tied"] = state["float32.few"]
    state["scalar"] = torch.tensor(7)
    state["empty"] = torch.zeros(3, 0, 2)
    state['ü "重み"\n\\'] = torch.arange(300)
    state["zeros"] = torch.zeros(1000)
    return state


def lossy():
    """Weights as one knows them, two thirds of them zero, and what no level holds."""
    state = {}
    for salt, dtype in enumerate(LOSSY):
        quarters = [(noise(480, 10 * salt + i) >> np.uint64(44)).astype(np.int64) - (1 << 19) for i in range(4)]
        weights = sum(quarters).astype(np.float64) / (1 << 25)  # exact, so the same anywhere
        weights[noise(480, 10 * salt + 5) % 3 > 0] = 0
        weights[:6] = np.nan, np.inf, -np.inf, 1e30, 1e-30, -0.0
        state[f"{name_of(dtype)}.matrix"] = torch.from_numpy(weights.reshape(24, 20)).to(dtype)
        state[f"{name_of(dtype)}.vector"] = torch.from_numpy(weights[:280].copy()).to(dtype)
    state["counts"] = torch.arange(400).reshape(20, 20)
    return state


if __name__ == "__main__":
    FOLDER.mkdir()
    sc.save(lossless(), FOLDER / "lossless.safetensors")
    for name, how in SAVED.items():
        sc.save(lossy(), FOLDER / f"{name}.safetensors", **how)
