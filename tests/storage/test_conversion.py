"""secateur.storage.conversion: to packed files and back, byte for byte, file by file and folder by folder."""

import hashlib
import json
import os
import shutil
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import secateur as sc
from secateur.errors import FileError, InputError, WriteError
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.storage.coding import BLOCK
from secateur.storage.conversion import packed_file_name, plain_file_name
from secateur.storage.dtypes import KINDS
from secateur.support import bits

DTYPES = [dtype for dtype, kind in KINDS.items() if kind.code is not None and dtype is not torch.float4_e2m1fn_x2]
INDEX = "model.safetensors.index.json"


# ---- helpers ----------------------------------------------------------------------------------------------------


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found, want):
    assert set(found) == set(want)
    for name in want:
        assert raw(found[name]) == raw(want[name]), name


def random(dtype, shape, seed=0, zeros=0.0):
    """Any bits at all, some of them zero: NaN and inf among the floats."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        found &= 1
    found[torch.rand(shape, generator=generator) < zeros] = 0
    return found.view(dtype).reshape(shape)


def bytes_of(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(40, 50) * (torch.rand(40, 50) > 0.8), "b": torch.randn(7), "step": torch.tensor(3)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two shards in two places, an index in an order of its own, files beside them."""
    made = tmp_path / "model"
    (made / "more").mkdir(parents=True)
    parts = [{f"w{i}": random(torch.bfloat16, (30, 40), i, 0.5), f"b{i}": torch.ones(3)} for i in range(2)]
    save_file(parts[0], made / "model-1.safetensors", metadata={"part": "1"})
    save_file(parts[1], made / "more" / "model-2.safetensors", metadata={"part": "2"})
    weight_map = {"b1": "more/model-2.safetensors", "w0": "model-1.safetensors"}
    weight_map |= {"w1": "more/model-2.safetensors", "b0": "model-1.safetensors"}
    (made / INDEX).write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}, indent=2) + "\n")
    (made / "config.json").write_text("{}")
    (made / "more" / "vocab.txt").write_text("a")
    return made


# ---- round trips ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_there_and_back_is_the_same_file(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("there")
    names = data.draw(st.lists(st.text(max_size=9), min_size=1, max_size=5, unique=True))
    names = [name for name in names if name != "__metadata__"] or ["w"]
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (13, 5), (300,), (17, 31)]
    tensors = {
        name: random(
            data.draw(st.sampled_from(DTYPES)),
            data.draw(st.sampled_from(shapes)),
            i,
            data.draw(st.sampled_from([0, 0.9])),
        )
        for i, name in enumerate(names)
    }
    metadata = data.draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=1))
    save_file(tensors, place / "a.safetensors", metadata=metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK", data.draw(st.sampled_from([8, 256, 1 << 18])))
        sc.pack(place / "a.safetensors", place / "b.safetensors", effort="fast")
        sc.unpack(place / "b.safetensors", place / "c.safetensors")
    assert (place / "c.safetensors").read_bytes() == (place / "a.safetensors").read_bytes()
    same(sc.load(place / "b.safetensors", verify=True), tensors)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float4_e2m1fn_x2], ids=str)
def test_each_dtype_there_and_back(tmp_path, dtype):
    tensors = {
        "sparse": random(dtype, (33, 71), 1, 0.9),
        "dense": random(dtype, (1001, 3), 2),
        "one": random(dtype, (1,)),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"größe": '"\\\n\t\x01'})
    packed = sc.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    plain = sc.unpack(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert packed.file_bytes == (tmp_path / "b.safetensors").stat().st_size
    assert plain.file_bytes == (tmp_path / "c.safetensors").stat().st_size
    assert packed.tensors == inspect(tmp_path / "b.safetensors").tensors
    assert plain.tensors == inspect(tmp_path / "c.safetensors").tensors


def test_tensors_of_several_blocks(tmp_path):
    tensors = {
        "a": torch.zeros(BLOCK + 5),
        "b": torch.arange(2 * BLOCK + 1, dtype=torch.int32),
        "c": torch.zeros(BLOCK),
    }
    tensors["a"][::97] = 1.5
    save_file(tensors, tmp_path / "a.safetensors")
    sc.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    sc.unpack(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_many_keys_of_metadata_keep_their_order(tmp_path):
    metadata = {f"key{i}": "ü" * i for i in range(20)}
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors", metadata=metadata)
    sc.pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    sc.unpack(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_folder_there_and_back(folder, tmp_path):
    before = bytes_of(folder)
    packed = sc.pack(folder, tmp_path / "packed")
    names = {name.replace(".safetensors", ".packed.safetensors") for name in before}
    assert set(bytes_of(tmp_path / "packed")) == names
    index = json.loads((tmp_path / "packed" / packed_file_name(INDEX)).read_text())
    assert index["metadata"] == {"total_size": 9}
    assert list(index["weight_map"]) == ["b1", "w0", "w1", "b0"]
    assert index["weight_map"]["w1"] == "more/model-2.packed.safetensors"
    assert [t.name for t in packed.tensors] == ["b1", "w0", "w1", "b0"]
    assert packed.tensors == inspect(tmp_path / "packed").tensors
    assert packed.file_bytes == inspect(tmp_path / "packed").file_bytes
    same(sc.load(tmp_path / "packed"), dict(iter_tensors(folder)))
    plain = sc.unpack(tmp_path / "packed", tmp_path / "plain")
    assert bytes_of(tmp_path / "plain") == before
    assert plain.tensors == inspect(folder).tensors
    assert bytes_of(folder) == before


def test_an_index_in_place_of_its_folder(folder, tmp_path):
    sc.pack(folder / INDEX, tmp_path / "packed")
    sc.unpack(tmp_path / "packed" / packed_file_name(INDEX), tmp_path / "plain")
    assert bytes_of(tmp_path / "plain") == bytes_of(folder)


def test_a_folder_of_one_file(file, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone / "model.safetensors")
    (alone / "config.json").write_text("{}")
    sc.pack(alone, tmp_path / "packed")
    assert sorted(bytes_of(tmp_path / "packed")) == ["config.json", "model.packed.safetensors"]
    sc.unpack(tmp_path / "packed", tmp_path / "plain")
    assert bytes_of(tmp_path / "plain") == bytes_of(alone)
    sc.pack(alone, tmp_path / "one.safetensors")  # a file, if one asks for a file
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.packed.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_of_torch(tmp_path, nested):
    shared = torch.randn(20, 30)
    state = {"a": shared, "b": torch.randn(5).double(), "c": shared, "turned": torch.randn(20, 30).t()}
    torch.save({"model": state, "epoch": 1} if nested else state, tmp_path / "m.pt")
    packed = sc.pack(tmp_path / "m.pt", tmp_path / "packed.safetensors")
    assert {t.name: t.coding for t in packed.tensors}["c"] == "tied to a"
    assert packed.total.bytes == 3 * 2400 + 40
    found = sc.load(tmp_path / "packed.safetensors")
    same(found, state)
    assert found["a"] is found["c"]
    for source in ("m.pt", "packed.safetensors"):  # the tied one is written under each name
        sc.unpack(tmp_path / source, tmp_path / "plain.safetensors")
        same(load_file(tmp_path / "plain.safetensors"), state)
        with safe_open(tmp_path / "plain.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_plain_files_among_packed_ones_are_copied(folder, tmp_path):
    sc.pack(folder, tmp_path / "packed")
    there = tmp_path / "packed" / "more" / "model-2.packed.safetensors"
    shutil.copy(folder / "more" / "model-2.safetensors", there)
    sc.unpack(tmp_path / "packed", tmp_path / "plain")
    assert bytes_of(tmp_path / "plain") == bytes_of(folder)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "c"], ["c", "a"]], ids="".join)
def test_an_index_that_names_a_part_of_a_packed_file(tmp_path, names):
    shared = torch.randn(20, 30)
    made = tmp_path / "model"
    made.mkdir()
    want = {"a": shared, "b": torch.randn(20, 30), "c": shared}
    sc.save(want, made / "m.packed.safetensors")
    index = made / "model.packed.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "m.packed.safetensors")}))
    want = {name: want[name] for name in names}
    sc.pack(made, tmp_path / "again")
    same(sc.load(tmp_path / "again"), want)
    sc.unpack(made, tmp_path / "plain")
    same(load_file(tmp_path / "plain" / "m.safetensors"), want)
    same(sc.load(made, verify=True), want)


# ---- levels -----------------------------------------------------------------------------------------------------


def test_packed_files_are_packed_anew_at_another_level(file, folder, tmp_path):
    sc.pack(file, tmp_path / "near.safetensors", level="near")
    sc.pack(file, tmp_path / "lossless.safetensors", effort="fast")
    again = sc.pack(tmp_path / "lossless.safetensors", tmp_path / "again.safetensors", level="near")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()
    assert {t.name: t.coding for t in again.tensors}["w"] == "step 0.015625"
    sc.pack(folder, tmp_path / "packed")
    sc.pack(tmp_path / "packed", tmp_path / "twice")
    assert bytes_of(tmp_path / "twice") == bytes_of(tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "zip"}, "no level named 'zip': choose lossless, fp16, bf16, near, small, tiny, or give step="),
        ({"level": "near", "step": 0.1}, "are two levels: give one of them"),
        ({"step": 0}, "give a step relative to the rms"),
        ({"effort": "max"}, "no effort named 'max': choose fast, normal, best"),
    ],
)
def test_levels_and_efforts_that_there_are_not(file, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        sc.pack(file, tmp_path / "out.safetensors", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_a_plain_file_cannot_hold(tmp_path):
    sc.save({"a": torch.ones(3), "z": torch.ones(3, dtype=torch.complex128)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"z is complex128, which a plain \.safetensors .*read it with secateur\.load"):
        sc.unpack(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert sc.load(tmp_path / "m.safetensors")["z"].dtype is torch.complex128


def test_what_was_read_without_unpacking_is_not_packed_again(file, tmp_path):
    sc.pack(file, tmp_path / "packed.safetensors")
    save_file(load_file(tmp_path / "packed.safetensors"), tmp_path / "naive.safetensors")
    with pytest.raises(InputError, match=r"w:packed-by-secateur is packed already: read it with secateur\.load"):
        sc.pack(tmp_path / "naive.safetensors", tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_unpack_sees_a_change_that_was_made_with_care(tmp_path, monkeypatch, whole):
    """Each checksum fits, but not the SHA-256 of the state."""
    from secateur.storage import state_hash

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(state_hash.StateHash, "hexdigest", lambda self: "0" * 64)
        sc.save({"w": torch.randn(40, 50)}, tmp_path / "m.packed.safetensors")
    sc.load(tmp_path / "m.packed.safetensors")
    src, dst = (
        (tmp_path, tmp_path.parent / f"{tmp_path.name}-out") if whole else ("m.packed.safetensors", "m.safetensors")
    )
    with pytest.raises(FileError, match=r"what it decodes to is not what was saved: copy or download it again"):
        sc.unpack(tmp_path / src, tmp_path / dst)
    with pytest.raises(FileError, match="not what was saved"):
        sc.load(tmp_path / "m.packed.safetensors", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.packed.safetensors"]
    assert not (tmp_path / dst).exists()


def test_a_damaged_shard_ends_the_work_and_leaves_nothing(folder, tmp_path):
    sc.pack(folder, tmp_path / "packed")
    shard = tmp_path / "packed" / "more" / "model-2.packed.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    for verb in (sc.unpack, sc.pack):
        with pytest.raises(FileError, match=r"w1 is damaged \(its checksum differs\): copy or download the file again"):
            verb(tmp_path / "packed", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "packed"]


@pytest.mark.parametrize("verb", [sc.pack, sc.unpack])
def test_where_it_is_written(file, folder, tmp_path, verb):
    before = bytes_of(tmp_path)
    for src, dst, error, message in [
        (file, file, InputError, "is the source, or lies in it, .*: give another place"),
        (folder, folder, InputError, "is the source"),
        (folder, folder / "more", InputError, "is the source, or lies in it"),
        (folder, file, WriteError, "is a file: give the name of a folder"),
        (
            file,
            tmp_path / "out.pt",
            InputError,
            r"writes \.safetensors files, so give a name that ends in it: out",
        ),
        (file, tmp_path / "none" / "out.safetensors", WriteError, "make its folder first"),
        (folder, tmp_path / "none" / "out", WriteError, "make its folder first"),
        (tmp_path / "m.safetensor", tmp_path / "out.safetensors", InputError, "no such file; .*m.safetensors"),
    ]:
        with pytest.raises(error, match=message):
            verb(src, dst)
    assert bytes_of(tmp_path) == before


def test_a_folder_of_its_own_gives_way_and_no_other(folder, tmp_path):
    out = tmp_path / "out"
    sc.pack(folder, out, level="near")
    sc.pack(folder, out)
    sc.pack(folder, tmp_path / "want")
    assert bytes_of(out) == bytes_of(tmp_path / "want")
    with pytest.raises(WriteError, match=r"out holds .*packed\.safetensors.*, which would be lost: give a new folder"):
        sc.unpack(folder, out)
    (out / "more" / "mine.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"out holds more/mine\.txt, which would be lost"):
        sc.pack(folder, out)
    (out / "more" / "mine.txt").unlink()
    assert bytes_of(out) == bytes_of(tmp_path / "want")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "want"]


def test_other_weights_are_left_out_and_said(folder, tmp_path):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    save_file({"a": torch.ones(2)}, folder / "more" / "adapter.safetensors")
    notes = sc.pack(folder, tmp_path / "out").notes
    assert notes == ("left out: more/adapter.safetensors, pytorch_model.bin (other weights)",)
    assert not list((tmp_path / "out").rglob("*.bin")) + list((tmp_path / "out").rglob("adapter*"))


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_progress_adds_up_to_the_bytes(file, folder, tmp_path):
    shared = torch.randn(20, 30)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.pt")
    for src, out in [(file, "f.safetensors"), (folder, "out"), (tmp_path / "tied.pt", "t.safetensors")]:
        size = sum(t.numel() * t.element_size() for _, t in iter_tensors(src))
        for verb, source, target in [(sc.pack, src, out), (sc.unpack, tmp_path / out, f"plain{out}")]:
            done = []
            verb(source, tmp_path / target, progress=done.append)
            assert min(done) > 0
            tied = 2400 if verb is sc.pack and "tied" in str(src) else 0  # of which nothing is written
            assert sum(done) == size - tied


def test_names():
    names = {"m.safetensors": "m.packed.safetensors", INDEX: "model.packed.safetensors.index.json"}
    for plain, packed in names.items():
        assert packed_file_name(plain) == packed_file_name(packed) == packed
        assert plain_file_name(plain) == plain_file_name(packed) == plain


# ---- what is copied, and how open it is --------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_nothing_outside_a_folder_is_copied(folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key").write_text("mine")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "more" / "far").symlink_to("../../elsewhere")
    (folder / "inside.json").symlink_to("config.json")
    (folder / "gone.json").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    notes = sc.pack(folder, tmp_path / "out").notes
    assert "left out: tokenizer.json (links that lead out of the folder)" in notes
    assert "left out: gone.json, more/far, pipe (not ordinary files)" in notes
    assert "mine" not in [p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert (tmp_path / "out" / "inside.json").read_text() == "{}"
    assert not (tmp_path / "out" / "inside.json").is_symlink()


@pytest.mark.parametrize("verb", [sc.pack, sc.unpack])
def test_weights_that_a_folder_only_links_to(folder, tmp_path, verb):
    (folder / "model-1.safetensors").rename(tmp_path / "far.safetensors")
    (folder / "model-1.safetensors").symlink_to(tmp_path / "far.safetensors")
    with pytest.raises(InputError, match=r"model-1\.safetensors leads out of its folder: copy the file there in place"):
        verb(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "w0" in sc.load(folder)


def test_a_snapshot_of_the_hugging_face_cache(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "model-1.safetensors", blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    sc.pack(snapshot, tmp_path / "out")
    assert sorted(bytes_of(tmp_path / "out")) == ["config.json", "model.packed.safetensors"]


def test_two_files_that_would_become_one(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(folder / "model-1.safetensors", folder / "model-1.packed.safetensors")
    index["weight_map"]["b0"] = "model-1.packed.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-1(\.packed)?\.safetensors and .* would both become .*: rename one of"):
        sc.pack(folder, tmp_path / "out")


def test_what_is_written_is_no_more_open_than_what_it_was_made_of(file, folder, tmp_path):
    file.chmod(0o600)
    folder.chmod(0o700)
    (folder / "model-1.safetensors").chmod(0o640)
    sc.pack(file, tmp_path / "out.safetensors")
    sc.pack(folder, tmp_path / "out")
    assert mode(tmp_path / "out.safetensors") == 0o600
    assert mode(tmp_path / "out") == 0o700
    assert mode(tmp_path / "out" / "model-1.packed.safetensors") & 0o007 == 0
    (tmp_path / "out.safetensors").chmod(0o644)  # whoever opened it up finds it so
    sc.pack(file, tmp_path / "out.safetensors")
    assert mode(tmp_path / "out.safetensors") == 0o644


@pytest.mark.parametrize("verb", [sc.pack, sc.unpack])
def test_a_bar_or_a_function_is_told_of_the_bytes(file, tmp_path, capsys, verb):
    done = []
    total = verb(file, tmp_path / "out.safetensors", progress=done.append).total.bytes
    assert sum(done) == total
    assert capsys.readouterr() == ("", "")
    verb(file, tmp_path / "out.safetensors", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{verb.__name__}ing" in err


def test_an_index_with_a_name_twice_and_a_shard_with_one_more(folder, tmp_path):
    text = (folder / INDEX).read_text()
    save_file({"w0": torch.ones(3), "b0": torch.ones(3), "extra": torch.ones(1)}, folder / "model-1.safetensors")
    assert "left extra, which the index does not name" in sc.pack(folder, tmp_path / "out").notes
    (folder / INDEX).write_text(text.replace('"b0"', '"w0"'))
    with pytest.raises(InputError, match=r"index\.json names w0 twice: leave one of them out"):
        sc.load(folder)


def test_an_output_that_links_to_itself_is_refused(tmp_path):
    save_file({"w": torch.eye(4)}, tmp_path / "m.safetensors")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(WriteError, match=r"leads back to itself: give another name"):
        sc.pack(tmp_path / "m.safetensors", loop)
