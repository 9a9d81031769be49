"""secateur.storage.checkpoints: tensors out of files, zeros counted, no pickled code run."""

import contextlib
import json
import os
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from secateur.errors import InputError
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.support import bits

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
OTHERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
OTHERS += [torch.uint16, torch.uint32, torch.uint64, torch.complex64]
TENSORS = {"b.weight": torch.eye(3), "a.bias": torch.tensor([0.0, -0.0, 1.0]), "step": torch.tensor(0)}


def same(found, want):
    assert list(found) == list(want)
    assert all(torch.equal(found[name], want[name]) and found[name].dtype == want[name].dtype for name in want)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_zeros_of_every_dtype(tmp_path, dtype, suffix):
    values = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    tensors = {"w": values, "empty": values[:0].clone(), "scalar": values[0, 0].clone()}
    file = tmp_path / f"m{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    found = {t.name: t for t in inspect(file).tensors}
    assert (found["w"].weights, found["w"].zeros, found["w"].sparsity) == (6, 3, 0.5)
    assert (found["w"].dtype, found["w"].shape) == (str(dtype).removeprefix("torch."), (2, 3))
    assert found["w"].bytes == 6 * values.element_size()
    assert (found["empty"].weights, found["empty"].zeros, found["empty"].sparsity) == (0, 0, 0.0)
    assert (found["scalar"].weights, found["scalar"].zeros, found["scalar"].shape) == (1, 1, ())


def test_dtypes_without_zero_and_of_two_values_a_byte(tmp_path):
    pairs = torch.tensor(
        [0x00, 0x08, 0x81, 0x77], dtype=torch.uint8
    )  # the nibbles 0 0, 8 0, 1 8, 7 7; 0 and 8 are zero
    tensors = {
        "e8m0": torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "fp4": pairs.view(torch.float4_e2m1fn_x2),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    found = {t.name: (t.weights, t.zeros, t.bytes) for t in inspect(tmp_path / "m.safetensors").tensors}
    assert found == {"e8m0": (4, 0, 4), "fp4": (8, 5, 4)}


def test_minus_zero_nan_and_denormals(tmp_path):
    torch.save({"w": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])}, tmp_path / "m.pt")
    assert inspect(tmp_path / "m.pt").total.zeros == 2


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_counts_add_up_over_chunks_views_and_layouts(tmp_path_factory, data):
    rows = data.draw(st.integers(0, 5))
    columns = data.draw(st.sampled_from([0, 1, 7, bits.CHUNK // 2 + 1, bits.CHUNK, bits.CHUNK + 3]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dense = (torch.rand(rows, columns) > 0.5).to(torch.int8)
    tensors = {"dense": dense, "transposed": dense.t(), "strided": dense[:, ::2], "sparse": dense.to_sparse()}
    file = tmp_path_factory.mktemp("views") / "m.pt"
    torch.save(tensors, file)
    for found in inspect(file).tensors:
        want = tensors[found.name].to_dense()
        assert (found.weights, found.zeros) == (want.numel(), want.numel() - int(torch.count_nonzero(want)))


def test_csr(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        torch.save({"w": torch.eye(4).to_sparse_csr()}, tmp_path / "m.pt")
        assert inspect(tmp_path / "m.pt").total.zeros == 12


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.pth", "pytorch_model.bin"])
def test_one_file(tmp_path, name):
    file = tmp_path / name
    save_file(TENSORS, file) if name.endswith("safetensors") else torch.save(TENSORS, file)
    want = dict(sorted(TENSORS.items())) if name.endswith("safetensors") else TENSORS
    found = dict(iter_tensors(file))
    assert found.keys() == want.keys()
    same({name: found[name] for name in want}, want)


def sharded(folder, **changes):
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, folder / "1.safetensors")
    save_file({"c": torch.zeros(3), "unlisted": torch.ones(1)}, folder / "2.safetensors")
    weight_map = {"c": "2.safetensors", "a": "1.safetensors", "b": "1.safetensors", **changes}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_by_index_or_folder(tmp_path):
    index = sharded(tmp_path)
    for path in (index, tmp_path, str(tmp_path)):
        same(dict(iter_tensors(path)), {"c": torch.zeros(3), "a": torch.zeros(2), "b": torch.ones(2)})
    assert inspect(tmp_path).total.zeros == 5


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        ({"state_dict": {"w": 1}, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": 1}}}}, ["w"]),
        ({"model": {"w": 1}, "step": 1}, ["w"]),
        ({"model": {"state_dict": {"w": 1}}}, ["w"]),
        ({"module": {}, "model_state_dict": {"w": 1, "extra": "text"}}, ["w"]),
        ({"encoder": {"w": 1}, "head": {"w": 1}, "optimizer": {"w": 1}, "lr": 0.1}, ["encoder.w", "head.w"]),
        (1, ["tensor"]),
    ],
)
def test_nested_dictionaries(tmp_path, saved, names):
    def fill(value):
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return torch.ones(2) if value == 1 and isinstance(value, int) else value

    torch.save(fill(saved), tmp_path / "m.pt")
    assert [name for name, _ in iter_tensors(tmp_path / "m.pt")] == names


def test_the_format_of_torch_before_1_6(tmp_path):
    torch.save(TENSORS, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    same(dict(iter_tensors(tmp_path / "m.pt")), TENSORS)


def test_a_table_a_dict_and_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.eye(2)}, "m.safetensors")
    found = inspect("m.safetensors")
    lines = str(found).splitlines()
    assert lines[0] == "m.safetensors"
    assert lines[3].split() == ["w", "float32", "2", "x", "2", "4", "2", "50.00", "%", "16", "B"]
    assert lines[4].startswith("total (1 tensor)")
    assert "| w " in found.markdown()
    plain = json.loads(json.dumps(found.to_dict()))
    facts = {"weights": 4, "zeros": 2, "bytes": 16, "sparsity": 0.5}
    stored = {"coding": "plain", "stored_bytes": 16, "ratio": 1.0, "error": None}
    assert plain["tensors"] == [{"name": "w", "dtype": "float32", "shape": [2, 2], **facts, **stored}]
    on_disk = (tmp_path / "m.safetensors").stat().st_size
    assert plain["total"] == {**facts, "stored_bytes": on_disk, "ratio": on_disk / 16}
    assert plain["notes"] == []


def test_a_note_on_torch_prune(tmp_path):
    model = nn.LSTM(2, 2)
    prune.l1_unstructured(model, "weight_hh_l0", 4)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    (note,) = inspect(tmp_path / "m.pt").notes
    assert note.startswith("1 tensor (_orig, _mask) is pruned")
    assert "secateur.from_torch_prune(model)" in note
    assert note in inspect(tmp_path / "m.pt").table().text(width=None)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("new", [True, False])
def test_pickled_code_is_refused_and_never_run(tmp_path, new):
    torch.save({"w": torch.ones(1), "x": Bomb(tmp_path / "ran")}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=r"m.pt needs pickled code \(\w+.mkdir\).*torch.save\(model.state_dict"):
        inspect(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"bare.bin"):
        inspect(tmp_path / "bare.bin")
    assert not (tmp_path / "ran").exists()


def test_whole_modules_and_torchscript_are_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(InputError, match=r"needs pickled code \(torch.nn.modules.linear.Linear\)"):
        inspect(tmp_path / "module.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pt")
    with pytest.raises(InputError, match=r"needs pickled code \(TorchScript\)"):
        inspect(tmp_path / "script.pt")


def test_missing_unknown_and_empty(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "x.h5").touch()
    (tmp_path / "bare").mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")
    for path, message in [
        ("modle.pt", "modle.pt: no such file; in that folder the nearest names are: model.pt"),
        ("nowhere/m.pt", "no such file"),
        ("x.h5", "unknown suffix '.h5': give .safetensors"),
        ("model.pt", "holds no tensor: give a file that holds a state_dict"),
        ("none.safetensors", "holds no tensor"),
        ("bare", r"bare is a folder without an index .*: give a file"),
        (".", r"folder without an index .*: give a file; valid names are: model.pt, none.safetensors, one.safetensors"),
    ]:
        with pytest.raises(InputError, match=message):
            iter_tensors(tmp_path / path)


@pytest.mark.parametrize("cut", [0, 4, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old.pt", "garbage.pt", "garbage.safetensors"])
def test_damaged_files(tmp_path, kind, cut):
    file = tmp_path / f"m.{kind}"
    if "garbage" in kind:
        file.write_bytes(b"hello world " * 500)
    elif kind == "safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=kind == "pt")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * cut) if cut < 1 else cut])
    with pytest.raises(InputError, match=r"is damaged or cut short, .*copy or download it again"):
        iter_tensors(file)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_flipped_bytes_give_an_answer_or_an_input_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flips")
    file = folder / data.draw(st.sampled_from(["m.safetensors", "m.pt"]))
    save_file(TENSORS, file) if file.suffix == ".safetensors" else torch.save(TENSORS, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(InputError):  # and no other error
        inspect(file)


def test_bad_indexes(tmp_path):
    index = sharded(tmp_path, d="3.safetensors")
    with pytest.raises(InputError, match=r"names 3.safetensors \(for d\), which is not beside it: copy it there"):
        inspect(tmp_path)
    sharded(tmp_path, d="../elsewhere.safetensors")
    save_file(TENSORS, tmp_path.parent / "elsewhere.safetensors")
    with pytest.raises(InputError, match="not beside it"):
        inspect(tmp_path)
    sharded(tmp_path, d="1.safetensors")
    with pytest.raises(InputError, match=r"1.safetensors lacks d, which .* promises: copy both from one save"):
        inspect(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is no index of shards: its JSON must hold"):
            inspect(tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="holds no tensor"):
        inspect(tmp_path)
    sharded(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds 2 indexes \(model.* other.*\): give one of them"):
        inspect(tmp_path)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    save_file({f"w{i}": torch.zeros(1000) for i in range(3)}, tmp_path / "m.safetensors")
    tensors = iter_tensors(tmp_path / "m.safetensors")
    held = []
    for _, tensor in tensors:
        assert all(earlier() is None for earlier in held)
        held.append(weakref.ref(tensor))
        del tensor
    assert len(held) == 3
