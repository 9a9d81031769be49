"""secateur.storage.state_hash: the identity of a state, whatever the order of its tensors."""

import hashlib
import random

import pytest
import torch
from forgery import Forgery
from packings import state

import secateur as sc
from secateur.storage.dtypes import words_of
from secateur.storage.state_hash import StateHash
from secateur.storage.stored import InMemory, stored_of


@pytest.fixture
def file(tmp_path):
    sc.save(state(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def digest(tensors):
    found = StateHash()
    for tensor in tensors:
        found.add(tensor, hashlib.sha256(words_of(tensor.tensor().reshape(-1)).data).hexdigest())
    return found.hexdigest()


def test_the_hash_of_a_state_is_that_of_its_documented_lines(file):
    lines = []
    for name, tensor in sorted(state().items()):
        if name != "decoder.weight":
            plain = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            shape = ",".join(map(str, tensor.shape))
            dtype = str(tensor.dtype).removeprefix("torch.")
            lines.append(f"{name} {dtype} {shape} {hashlib.sha256(plain).hexdigest()}\n")
    assert Forgery.of(file).manifest["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_hash_of_a_state_does_not_depend_on_order(file):
    tensors = [t for t in stored_of(state()) if isinstance(t, InMemory)]
    want = Forgery.of(file).manifest["sha256"]
    for seed in range(5):
        random.Random(seed).shuffle(tensors)
        assert digest(tensors) == want


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(3), "b": torch.zeros(2)},  # names
        {"w": torch.ones(1, 3), "b": torch.zeros(2)},  # shape
        {"w": torch.full((3,), 0x3F800000, dtype=torch.int32), "b": torch.zeros(2)},  # dtype
        {"w": torch.tensor([1.0, 1, 2]), "b": torch.zeros(2)},  # a bit
        {"w": torch.ones(3), "b": torch.tensor([0.0, -0.0])},
        {"w": torch.ones(3)},
    ],
)
def test_the_hash_of_a_state_depends_on_all_else(other):
    assert digest(stored_of({"w": torch.ones(3), "b": torch.zeros(2)})) != digest(stored_of(other))
