"""States to be packed, and how to tell that they came back."""

import numpy as np
import torch

from secateur.storage.dtypes import KINDS, words_of


def sparse(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values.mul_(torch.rand(*shape, generator=generator) < 0.2).to(dtype)


def state():
    """Packed and plain, tied, empty and scalar tensors."""
    weight = sparse(40, 30)
    return {
        "embed.weight": weight,
        "bias": torch.arange(30.0),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": sparse(20, 20, seed=1, dtype=torch.bfloat16),
        "counts": torch.arange(500),
        "decoder.weight": weight,
        "noise": torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 300)),
    }


def every_dtype():
    """Of each dtype one tensor worth packing and one that is not."""
    found = {}
    for number, (dtype, kind) in enumerate(KINDS.items()):
        rng = np.random.default_rng(number)
        raw = rng.integers(0, 2, (24, 32 * kind.itemsize), np.uint8) * (rng.random((24, 1)) < 0.3).astype(np.uint8)
        found[f"{number}.many"] = torch.from_numpy(raw).view(dtype)
        found[f"{number}.few"] = torch.from_numpy(raw[:1, : 3 * kind.itemsize].copy()).view(dtype)
    return found


def identical(found, want):
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert np.array_equal(words_of(found[name].reshape(-1)), words_of(tensor.reshape(-1))), name


class on_threads:
    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)
