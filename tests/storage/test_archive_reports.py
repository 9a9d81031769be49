"""secateur.storage.archive: what `save` says of what it wrote is true."""

import pytest
import torch
from forgery import Forgery
from saved_models import Odd, Shared, pruned
from torch import nn

import secateur as sc
from models import Net, build, same
from secateur.storage.checkpoints import inspect
from secateur.storage.coding import BLOCK

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

LEVELS = "lossless", "fp16", "bf16", "near", "small", "tiny"

# ---- what is reported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [Net, Shared, Odd])
def test_the_report_is_true(tmp_path, kind, level):
    model, file = pruned(kind), tmp_path / "m.safetensors"
    written = sc.save(model, file, level=level)
    state, back, forgery = model.state_dict(), sc.load(file, verify=True), Forgery.of(file)
    assert (written.path, written.file_bytes) == (str(file), file.stat().st_size)
    assert [t.name for t in written.tensors] == list(state)
    assert written.ratio == file.stat().st_size / sum(t.nbytes for t in state.values())
    assert sum(t.stored_bytes for t in written.tensors) == len(forgery.data)
    for told in written.tensors:
        original, found = state[told.name], back[told.name]
        assert (told.dtype, told.shape) == (str(original.dtype).removeprefix("torch."), tuple(original.shape))
        assert told.bytes == original.nbytes
        if told.dtype != "float4_e2m1fn_x2":
            assert told.weights == original.numel()
            assert told.zeros == (0 if told.dtype == "float8_e8m0fnu" else int((original == 0).sum()))
        if told.coding.startswith("tied to "):
            assert found is back[told.coding.removeprefix("tied to ")]
            continue
        assert told.stored_bytes == len(forgery.blob(told.name))
        if told.coding in ("plain", "lossless"):
            assert told.error is None
            assert same(found, original.contiguous())
        else:
            lost = (found.double() - original.double()).norm() / original.double().norm()
            assert told.error == pytest.approx(float(lost), rel=1e-9)
            assert 0 < told.error < {"fp16": 1e-3, "bf16": 4e-3, "near": 0.01, "small": 0.04, "tiny": 0.16}[level]
            assert bool(((found == 0) == (original == 0)).all())
            assert torch.equal(found.sign(), original.sign())
    inspected = inspect(file)
    facts = [(t.name, t.zeros, t.coding, t.stored_bytes) for t in written.tensors]
    assert [(t.name, t.zeros, t.coding, t.stored_bytes) for t in inspected.tensors] == facts
    assert inspected.file_bytes == written.file_bytes
    assert ("error" in str(written)) == (level != "lossless")


def test_the_error_over_several_blocks(tmp_path):
    weight = torch.randn(3, BLOCK // 2)
    weight[1] *= 0.01  # which has a step of its own, in part
    for level in ("fp16", "small"):
        (told,) = sc.save({"w": weight}, tmp_path / "m.safetensors", level=level, effort="fast").tensors
        lost = (sc.load(tmp_path / "m.safetensors")["w"].double() - weight.double()).norm() / weight.double().norm()
        assert told.error == pytest.approx(float(lost), rel=1e-9)


def test_which_tensors_lose_at_which_level(tmp_path):
    model = build(Odd)
    wide = {"conv.weight", "across", "every_other", "frozen", "twice"}
    for level in LEVELS[1:]:
        written = sc.save(model, tmp_path / "m.safetensors", level=level)
        lossy = {t.name for t in written.tensors if t.coding not in ("plain", "lossless")}
        assert lossy == (wide if level in ("fp16", "bf16") else wide | {"brain"})
    assert {t.coding for t in sc.save(model, tmp_path / "m.safetensors", step=0.01).tensors} >= {
        "step 0.01",
        "lossless",
    }


def test_coarser_levels_make_smaller_files(tmp_path):
    model = nn.Linear(400, 400)
    sc.prune(model, 0.9)
    by_step = [
        sc.save(model, tmp_path / "m.safetensors", step=step).file_bytes for step in (1 / 256, 1 / 64, 1 / 16, 1 / 4)
    ]
    assert by_step == sorted(by_step, reverse=True)
    lossless, half = (
        sc.save(model, tmp_path / "m.safetensors", level=level).file_bytes for level in ("lossless", "fp16")
    )
    assert by_step[0] < half < lossless


def test_saving_again_loses_no_more(tmp_path):
    """What was stored at a level of 16 bits is held by it exactly."""
    model = pruned(Net)
    for level in ("fp16", "bf16"):
        sc.save(model, tmp_path / "m.safetensors", level=level)
        once = sc.load(tmp_path / "m.safetensors")
        again = sc.save(once, tmp_path / "again.safetensors", level=level)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
        assert all(not t.error for t in again.tensors)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_weights_that_no_level_holds(tmp_path, level):
    weight = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    weight[0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, -0.0])
    sc.save({"weight": weight}, tmp_path / "m.safetensors", level=level)
    back = sc.load(tmp_path / "m.safetensors", verify=True)["weight"]
    exact = [0, 1, 2, 3] if level != "bf16" else [0, 1, 2]  # bf16 holds 1e38
    assert same(back[0, exact], weight[0, exact])
    assert back[0, 4] > 0
    assert not back[0, 5].signbit()
