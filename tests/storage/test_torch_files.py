"""secateur.storage.torch_files: what is taken of a training checkpoint, what is left, and what is no file of torch."""

import os
import zipfile

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileError, InputError, InputTypeError, UnknownNameError
from secateur.storage.checkpoints import inspect, opened
from secateur.storage.pruning import Recipe, prune_checkpoint
from secateur.storage.torch_files import SUFFIXES, read_states

ONE = torch.ones(2, 2)


def saved(folder, state, name="m.pt"):
    torch.save(state, folder / name)
    return folder / name


def training(model=None):
    model = model or nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


# ---- what is taken and what is left -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "note"),
    [
        ({"w": ONE}, None),
        ({"state_dict": {"w": ONE}}, None),
        ({"w": ONE, "epoch": 3}, "took 1 tensor; left epoch"),
        (
            {"model": {"w": ONE}, "ema": {"w": ONE, "b": -ONE}, "optimizer": [ONE], "epoch": 3},
            "took model (1 tensor); left ema (2 tensors), optimizer (1 tensor), epoch; "
            "to take another state: --key ema (key= in Python)",
        ),
        (
            {"epoch": 1, "state_dict": {"w": ONE}, "optimizer_states": [{"state": {0: {"m": ONE}}}]},
            "took state_dict (1 tensor); left optimizer_states (1 tensor), epoch",
        ),
        (
            {"state_dict": {"w": ONE}, "callbacks": {"Checkpoint": {"best": torch.tensor(0.5)}}, "ema": {"w": ONE}},
            "took state_dict (1 tensor); left callbacks (1 tensor), ema (1 tensor); "
            "to take another state: --key ema (key= in Python)",
        ),
        (
            {"gen": {"w": ONE}, "dis": {"w": ONE}, "optim_g": {"w": ONE}},
            "took 2 tensors; left optim_g (1 tensor)",
        ),
        (
            {"net": {"model": {"w": ONE}, "ema": {"w": ONE}}},
            "took net.model (1 tensor); left net.ema (1 tensor); to take another state: --key net.ema (key= in Python)",
        ),
        ({"model": {}, "w": ONE}, "took 1 tensor; left model"),
        (
            {"w": ONE, **{f"e{i}": i for i in range(20)}},
            "took 1 tensor; left e0, e1, e2, e3, e4, e5, e6, e7 and 12 more",
        ),
    ],
)
def test_what_was_taken_and_what_was_left_is_said(tmp_path, state, note):
    assert read_states(saved(tmp_path, state))[1] == (() if note is None else (note,))
    assert inspect(tmp_path / "m.pt").notes == (() if note is None else (note,))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_verb_says_it(tmp_path, suffix):
    model, optimizer = training()
    file = saved(tmp_path, {"model": model, "optimizer": optimizer}, f"m{suffix}")
    for verb in (sc.pack, sc.unpack):
        (note,) = verb(file, tmp_path / "out.safetensors").notes
        assert note == "took model (2 tensors); left optimizer (6 tensors)"


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", 1.0), ("ema", 2.0), ("more.deep.state", 3.0), ("more.deep", 3.0), ("a.b", 4.0), ("7", 5.0)],
)
def test_a_key_takes_one_of_several_states(tmp_path, key, value):
    def of(number):
        return {"w": torch.full((2, 2), number)}

    state = {"model": of(1.0), "ema": of(2.0), "more": {"deep": {"state": of(3.0)}}, "a.b": of(4.0), 7: of(5.0)}
    found = sc.load(saved(tmp_path, state), key=key)
    assert [tensor.unique().item() for tensor in found.values()] == [value]
    assert sc.pack(opened(tmp_path / "m.pt", key), tmp_path / "out.safetensors").tensors[0].weights == 4


def test_keys_that_there_are_not(tmp_path):
    file = saved(tmp_path, {"model": {"w": ONE}, "ema": {"w": ONE}, "epoch": 3})
    with pytest.raises(UnknownNameError, match="has no em; the nearest names are: ema"):
        sc.load(file, key="em")
    with pytest.raises(UnknownNameError, match=r"has no x in ema; valid names are: w"):
        sc.load(file, key="ema.x")
    with pytest.raises(InputError, match="holds no tensor under epoch: give a file that holds a state_dict"):
        sc.load(file, key="epoch")
    sc.save({"w": ONE}, tmp_path / "one.safetensors")
    with pytest.raises(InputError, match="holds one state, not several to choose from: leave out the key 'ema'"):
        sc.load(tmp_path / "one.safetensors", key="ema")


@pytest.mark.parametrize(
    ("state", "places"),
    [
        ({"enc.w": ONE, "enc": {"w": ONE}}, r"enc\.w, that of \['enc\.w'\] and that of \['enc'\]\['w'\]"),
        ({1: ONE, "1": ONE}, r"1, that of \[1\] and that of \['1'\]"),
        ({"a": {"b.c": ONE, "b": {"c": ONE}}}, r"b\.c, that of \['a'\]\['b\.c'\] and that of \['a'\]\['b'\]\['c'\]"),
        ({"a": {"b": {"c": ONE}}, "a.b": {"c": ONE}}, r"a\.b\.c, that of \['a'\]\['b'\]\['c'\] and that of"),
        ({True: ONE, "True": ONE}, r"True, that of \[True\] and that of \['True'\]"),
    ],
)
def test_two_tensors_of_one_name(tmp_path, state, places):
    for read in (sc.load, inspect, lambda file: sc.pack(file, tmp_path / "out.safetensors")):
        with pytest.raises(InputError, match=rf"m\.pt: two tensors get the name {places}.*rename one of them"):
            read(saved(tmp_path, state))
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


# ---- what is no tensor of plain numbers -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]), r"save each of tensor\.unbind"),
        (lambda: torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8), r"torch\.qint8.*save tensor\.dequantize\(\)"),
        (lambda: torch.quantize_per_channel(ONE, ONE[0], ONE[0], 0, torch.quint8), r"save tensor\.dequantize\(\)"),
        (lambda: torch.empty(3, 3, device="meta"), "on the meta device and holds no values: materialise it first"),
        (lambda: torch.zeros(1).expand(1 << 20, 1 << 20), r"4398\.0 GB, of which 4 B are stored.*\.clone\(\) first"),
        (lambda: torch.zeros(8).as_strided((1 << 15, 1 << 15), (0, 0)), r"share memory.*\.clone\(\) first"),
        (lambda: torch.zeros(9).expand(1 << 28, 9)[:, ::2], r"share memory.*\.clone\(\) first"),
    ],
)
def test_tensors_that_are_named_and_refused(tmp_path, make, remedy):
    file = saved(tmp_path, {"fine": ONE, "odd": make()})
    for read in (sc.load, inspect, lambda file: sc.unpack(file, tmp_path / "out.safetensors")):
        with pytest.raises((InputError, InputTypeError), match=rf"m\.pt: odd is.*{remedy}"):
            read(file)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_many_that_are_spread_a_little_are_refused_together(tmp_path):
    one = torch.zeros(1)
    state = {f"w{i}": one.expand(1 << 22) for i in range(40)}
    with pytest.raises(InputError, match=r"w16 is 16\.8 MB, of which 4 B are stored.*copy it with \.clone"):
        inspect(saved(tmp_path, state))
    found = sc.load(saved(tmp_path, {"w": one.expand(400)}))
    assert torch.equal(found["w"], torch.zeros(400))


def test_dictionaries_that_are_there_again_and_again(tmp_path):
    """A kilobyte in which one tensor has a hundred million names."""
    inner = {"w": ONE}
    for _ in range(5):
        inner = {str(i): inner for i in range(40)}
    file = saved(tmp_path, inner)
    assert file.stat().st_size < 10_000
    with pytest.raises(FileError, match=r"names more tensors than its bytes can hold: copy or download it again"):
        inspect(file)


@pytest.mark.filterwarnings("ignore")  # torch calls some of its checks of sparse tensors experimental
def test_sparse_tensors_are_counted_and_not_written(tmp_path):
    place = torch.zeros(2, 1, dtype=torch.int64)
    file = saved(tmp_path, {"w": torch.sparse_coo_tensor(place, torch.ones(1), (1 << 30, 1 << 30))})
    assert inspect(file).total.zeros == (1 << 60) - 1
    for write in (sc.pack, sc.unpack, lambda *paths: prune_checkpoint(*paths, Recipe(0.5))):
        with pytest.raises(InputTypeError, match=r"w is torch\.sparse_coo.*save tensor\.to_dense\(\)"):
            write(file, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


# ---- what is no file of torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 2, 100, 0.5, -300, -22, -1])
def test_files_cut_anywhere(tmp_path, new, cut):
    torch.save({"w": torch.randn(40, 40)}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[: int(cut * len(whole)) if 0 < cut < 1 else cut])
    with pytest.raises(FileError, match=r"m\.pt is damaged or cut short.*copy or download it again") as caught:
        inspect(tmp_path / "m.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [os.urandom(5000), b"\x80\x02}q\x00.", b"PK\x05\x06" + bytes(18), b"\x80\x04" + b"(" * 5000, b"{}"]
)
def test_garbage(tmp_path, data):
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(FileError, match=r"m\.pt is damaged or cut short.*copy or download it again") as caught:
        inspect(tmp_path / "m.pt")
    assert "weights_only" not in str(caught.value)


def forged(file, old, new):
    """The file of torch with other numbers in its pickle."""
    with zipfile.ZipFile(file) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w") as whole:
        for name, data in parts.items():
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            whole.writestr(name, data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x10K\x11", b"J\x00\x00\x00\x10K\x11"),  # a shape of 2^28 rows
        (b"K\x10K\x11", b"J\xff\xff\xff\xffK\x11"),  # of -1
        (b"K\x11K\x01", b"J\x00\x00\x00\x40K\x01"),  # a stride of 2^30
    ],
)
def test_forged_shapes_and_storages(tmp_path, old, new):
    file = saved(tmp_path, {"w": torch.ones(16, 17)})
    forged(file, old, new)
    with pytest.raises(FileError, match=r"m\.pt is damaged or cut short.*copy or download it again"):
        inspect(file)


def rewritten(file, name, content):
    """The same archive, compressed, with other bytes in one of its entries."""
    with zipfile.ZipFile(file) as old:
        entries = {entry: old.read(entry) for entry in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, given in entries.items():
            new.writestr(entry, content if entry.endswith(name) else given)


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "nothing"])
def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, name):
    file = saved(tmp_path, {"w": torch.ones(16, 16)})
    rewritten(file, name, bytes(64 << 20))
    assert file.stat().st_size < 1 << 17
    for verb in (inspect, sc.load, lambda f: sc.pack(f, tmp_path / "o.safetensors")):
        with pytest.raises(FileError, match=r"m\.pt is a compressed archive.*write it again with torch\.save"):
            verb(file)
