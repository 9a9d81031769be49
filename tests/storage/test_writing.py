"""secateur.storage.writing: a file that safetensors reads, the same to the byte on any threads."""

import json

import numpy as np
import pytest
import torch
from forgery import PACKED, Forgery
from packings import every_dtype, identical, on_threads, sparse, state
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import secateur as sc
from secateur.storage.checkpoints import iter_tensors
from secateur.storage.coding import BLOCK
from secateur.storage.dtypes import BY_CODE, KINDS

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

ALIGNMENT = 8


def test_safetensors_reads_the_container(tmp_path):
    tensors = every_dtype() | state()
    sc.save(tensors, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as opened_file:
        names = set(opened_file.keys())
        metadata = opened_file.metadata()
        found = {name: opened_file.get_tensor(name) for name in names}
    assert set(metadata) == {"secateur", "secateur.crc32"}
    for name, tensor in tensors.items():
        if name == "decoder.weight":
            assert not {name, name + PACKED} & names
        elif name in names:  # as it is
            assert found[name].dtype == tensor.dtype
            identical({name: found[name]}, {name: tensor})
        else:
            assert found[name + PACKED].dtype is torch.uint8
    assert len(names) == len(tensors) - 1
    assert {"bias", "steps", "empty", "noise"} <= names
    assert {"embed.weight" + PACKED, "half" + PACKED, "counts" + PACKED} <= names


def test_what_lies_in_the_container_is_aligned_and_without_gaps(tmp_path):
    sc.save(every_dtype() | state(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    forgery, end = Forgery.of(tmp_path / "m.safetensors"), 0
    assert (len(whole) - len(forgery.data)) % ALIGNMENT == 0
    for slot in sorted(forgery.slots.values(), key=lambda slot: slot["data_offsets"]):
        start, stop = slot["data_offsets"]
        assert start == end
        assert start % min(KINDS[BY_CODE[slot["dtype"]]].itemsize, ALIGNMENT) == 0
        end = stop
    assert end == len(forgery.data)


def test_an_unaware_reader_is_told(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    sc.prune(model, 0.9)
    sc.save(model, tmp_path / "m.safetensors")
    raw = load_file(tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0.weight.*Unexpected key.*0.weight:packed-by-secateur"):
        nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2)).load_state_dict(raw)


def test_two_saves_are_the_same_to_the_byte(tmp_path):
    for level in ("lossless", "fp16", "near"):
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for file, threads in zip(files, (1, 4), strict=True):
            with on_threads(threads):
                sc.save(every_dtype() | state(), file, level=level)
        assert files[0].read_bytes() == files[1].read_bytes()
    sc.save(sc.load(files[0]), files[1])
    assert sc.load(files[1]).keys() == sc.load(files[0]).keys()


def test_reading_is_the_same_on_any_number_of_threads(tmp_path):
    tensors = every_dtype() | state() | {"large": sparse(3, BLOCK + 5), "larger": sparse(2 * BLOCK, seed=4)}
    sc.save(tensors, tmp_path / "m.safetensors")
    for threads in (1, 2, 8):
        with on_threads(threads):
            identical(sc.load(tmp_path / "m.safetensors", verify=True), tensors)
            identical(dict(iter_tensors(tmp_path / "m.safetensors")), tensors)


def test_names_of_all_kinds(tmp_path):
    names = [
        "",
        " ",
        "a.b.c",
        "ü.重み",
        'quote"',
        "back\\slash",
        "line\nbreak",
        "\x00",
        "x" * 5000,
        "secateur",
        "__metadata",
    ]
    tensors = {name: sparse(20, 20, seed=seed) if seed % 2 else torch.ones(2) for seed, name in enumerate(names)}
    sc.save(tensors, tmp_path / "m.safetensors")
    identical(sc.load(tmp_path / "m.safetensors", verify=True), tensors)


def test_many_tensors(tmp_path):
    tensors = {f"layer.{i}.weight": torch.full((i % 300,), float(i)) for i in range(3000)}
    sc.save(tensors, tmp_path / "m.safetensors", level="near")  # which vectors do not lose by
    identical(sc.load(tmp_path / "m.safetensors", verify=True), tensors)


@pytest.mark.parametrize("level", ["lossless", "fp16", "near"])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_scalars_and_noise_of_every_dtype_leave_the_header_its_room(tmp_path, dtype, count, level):
    """Nothing shrinks here, so a blob is longer than the tensor, and the header that says so longer too."""
    rng, size = np.random.default_rng(0), KINDS[dtype].itemsize
    one = 1 if dtype is torch.bool else 255
    scalars = {
        str(i): torch.from_numpy(rng.integers(0, one, size, np.uint8, endpoint=True)).view(dtype)[0]
        for i in range(count)
    }
    noise = torch.from_numpy(rng.integers(0, one, 300 * size, np.uint8, endpoint=True)).view(dtype)
    tensors = {**scalars, "noise": noise, "short": noise[:3].clone()}
    sc.save(tensors, tmp_path / "m.safetensors", level=level)
    identical(sc.load(tmp_path / "m.safetensors", verify=True), tensors)


def test_a_manifest_says_nothing_that_is_not_in_the_file(tmp_path):
    sc.save(state(), tmp_path / "m.safetensors")
    manifest = Forgery.of(tmp_path / "m.safetensors").manifest
    assert set(manifest) == {"version", "sha256", "metadata", "tensors"}
    assert list(manifest["tensors"]) == list(state())
    assert manifest["tensors"]["decoder.weight"] == "embed.weight"
    dtype, shape, level, nonzeros, crc32 = manifest["tensors"]["embed.weight"]
    assert (dtype, shape, level) == ("float32", [40, 30], "lossless")
    assert nonzeros == int(state()["embed.weight"].count_nonzero())
    assert len(crc32) == 8
    json.dumps(manifest)
