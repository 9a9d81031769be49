"""Files of version 1 are read for good: those in `golden/`, made once by `make_golden.py`, give what they held."""

import hashlib

import make_golden
import pytest
import torch
from forgery import PACKED, Forgery
from make_golden import FOLDER, LOSSY, SAVED

import secateur as sc
from models import same
from secateur.storage.checkpoints import inspect
from secateur.storage.dtypes import KINDS, name_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DIGESTS = {
    "bf16": "0ddb20cde84f94677a1d1158ed929c850b836c3815e4b0113490316214c344d9",
    "fp16": "a112fb0ae1b16ea276f007b4eeee1e0e6f823b91841cdbd70db3a5408d803002",
    "near": "1c4fa72f8a6bb099f5dd6e0a80f0fd0c311ef9382d0abc463c691893c02d6bf0",
    "small": "caedd8706de5300a0259ff253f4d0c4b1069bc42ce56e1ef8cb31253d064cbfe",
    "step": "cffda86562be1060fa1ea2e8cdcd517b10de0db3ed86c77a167f23a8fb24d049",
    "tiny": "d906837fc7a45cd11edf0aa39a2b1e9422e3d0446bc2a4a4f4d8edf4d02ce00d",
}
"""SHA-256 of the bytes of all tensors, one after the other."""


def digest(state):
    found = hashlib.sha256()
    for tensor in state.values():
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_lossless():
    found, want = sc.load(FOLDER / "lossless.safetensors", verify=True), make_golden.lossless()
    assert list(found) == list(want)
    assert same(found, want)
    assert found["tied"] is found["float32.dense"]
    assert found["also tied"] is found["float32.few"]


@pytest.mark.parametrize("name", SAVED)
def test_lossy(name):
    found, want = sc.load(FOLDER / f"{name}.safetensors", verify=True), make_golden.lossy()
    assert list(found) == list(want)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in want.items()}
    assert digest(found) == DIGESTS[name]
    for tensor, original in zip(found.values(), want.values(), strict=True):
        assert bool(((tensor == 0) == (original == 0)).all())


def test_what_the_files_cover():
    forgery = Forgery.of(FOLDER / "lossless.safetensors")
    blocks = {name.removesuffix(PACKED): forgery.blob(name)[:2] for name in forgery.slots if name.endswith(PACKED)}
    for dtype in KINDS:
        assert blocks[f"{name_of(dtype)}.dense"] == b"\0\0"
        assert blocks[f"{name_of(dtype)}.sparse"] == b"\1\0"
        if KINDS[dtype].code is not None:
            assert forgery.tensors[f"{name_of(dtype)}.few"][2] == "plain"
    for name, code in {"fp16": 1, "bf16": 2, "near": 3, "small": 3, "tiny": 3, "step": 3}.items():
        forgery = Forgery.of(FOLDER / f"{name}.safetensors")
        for dtype in LOSSY[: 2 if code < 3 else 4]:
            assert forgery.blob(f"{name_of(dtype)}.matrix")[:2] == bytes([1, code])
        assert forgery.manifest["version"] == 1
        assert len(forgery.blob("float32.matrix")) > 0


def test_what_they_say_of_themselves():
    found = {t.name: t for t in inspect(FOLDER / "lossless.safetensors").tensors}
    for name, tensor in make_golden.lossless().items():
        if tensor.dtype not in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
            assert found[name].zeros == int((tensor == 0).sum()), name
    assert found["tied"].coding == "tied to float32.dense"
    codings = {inspect(FOLDER / f"{name}.safetensors").tensors[0].coding for name in SAVED}
    assert codings == {"fp16", "bf16", "step 0.015625", "step 0.0625", "step 0.25", "step 0.3"}


def test_they_take_little_room():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60_000
