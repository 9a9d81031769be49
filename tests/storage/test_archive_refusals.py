"""secateur.storage.archive: what cannot be saved or loaded is refused in words, and nothing has changed."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from forgery import Forgery
from safetensors.torch import load_file
from saved_models import Wide, pruned, unchanged
from torch import nn
from torch.nn.utils import parametrizations

import secateur as sc
from models import Net, build, example, same
from secateur.errors import FileError, InputError, InputTypeError, UnknownNameError, WriteError
from secateur.storage import coding

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


# ---- what is refused --------------------------------------------------------------------------------------------


class Stateful(Wide):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


class Counted(Wide):
    def get_extra_state(self):
        return torch.tensor(3)

    def set_extra_state(self, state):
        pass


class Halved(Wide):
    """Its state_dict is computed."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "computed"] = self.first.weight / 2


class Subclass(torch.Tensor):
    pass


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these deprecated
        return torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)


def compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.eye(3).to_sparse(),
            r"odd is torch.sparse_coo, which no .safetensors file holds: save .*to_dense",
        ),
        (compressed, r"odd is torch.sparse_csr, which no .safetensors file holds: save tensor.to_dense\(\)"),
        (quantized, r"odd is torch.qint8, which no .safetensors file holds"),
        (lambda: torch.empty(3, device="meta"), "odd is on the meta device and holds no values: materialise it first"),
        (nn.UninitializedParameter, "odd is lazy: run one batch through the model first"),
        (lambda: torch.ones(3).as_subclass(Subclass), "odd is a Subclass, not a plain tensor: save what it stands for"),
        (lambda: 3, "odd is an int: a .safetensors file holds tensors by name; save it elsewhere"),
        (lambda: None, "odd is None: a .safetensors file holds tensors by name; save it elsewhere"),
        (lambda: np.ones(3), "odd is a ndarray: a .safetensors file holds tensors by name; save it elsewhere"),
    ],
)
def test_what_is_no_plain_tensor(tmp_path, make, message):
    state = {"fine": torch.randn(20, 20), "odd": make(), "more": torch.ones(2)}
    (tmp_path / "m.safetensors").write_text("old")
    with unchanged(state, tmp_path), pytest.raises(InputTypeError, match=message):
        sc.save(state, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Stateful(), r"_extra_state is a dict: a .safetensors file holds tensors by name; save it elsewhere"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight is lazy: run one batch through the model first"),
        (nn.Linear(3, 3, device="meta"), "weight is on the meta device and holds no values: materialise it first"),
        ({1: torch.ones(2)}, "1 is a Tensor: a .safetensors file holds tensors by name"),
        ([torch.ones(2)], "save takes a module or a state_dict, not a list"),
        (torch.ones(2), "save takes a module or a state_dict, not a Tensor"),
        (None, "save takes a module or a state_dict, not None"),
    ],
)
def test_what_has_no_state(tmp_path, model, message):
    with pytest.raises(InputTypeError, match=message):
        sc.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m", "m.pt", "m.safetensor", "m.safetensors.gz", "safetensors", ".safetensors"])
def test_another_suffix(tmp_path, name):
    with pytest.raises(InputError, match=r"secateur writes \.safetensors files, so give a name that ends in it: \S+"):
        sc.save(build(Wide), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "fp8"}, "no level named 'fp8': choose lossless, fp16, bf16, near, small, tiny, or give step="),
        ({"level": "near", "step": 0.1}, "are two levels: give one of them"),
        ({"step": 0}, "step=0: give a step relative to the rms of the weights, such as 1/64"),
        ({"effort": "slow"}, "no effort named 'slow': choose fast, normal, best"),
    ],
)
def test_unknown_options(tmp_path, options, message):
    model = build(Wide)
    with unchanged(model, tmp_path), pytest.raises(InputError, match=message):
        sc.save(model, tmp_path / "m.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_no_file_holds(tmp_path, name):
    with pytest.raises(InputError, match="rename"):
        sc.save({name: torch.ones(300)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="rename"):
        sc.save({name: torch.ones(2)}, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_was_read_without_unpacking_is_not_packed_again(tmp_path):
    sc.save(pruned(Wide), tmp_path / "m.safetensors")
    raw = load_file(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"first.weight.* is packed already: read it with secateur.load, then save"):
        sc.save(raw, tmp_path / "again.safetensors")


@pytest.fixture
def file(tmp_path):
    sc.save(pruned(Wide), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def renamed(old, new):
    model = build(Wide, seed=1)
    model._modules = {new if name == old else name: module for name, module in model._modules.items()}
    return model


def test_names_that_differ(file, tmp_path):
    class Larger(Wide):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(10, 10)

    for model, message in [
        (
            Larger(),
            r"is of another model: it lacks third.weight; the nearest names are: .*first.weight.*; strict=False",
        ),
        (
            nn.Sequential(build(Wide)),
            r"lacks 0.first.weight; the nearest names are: first.weight.* and has first.weight",
        ),
        (
            renamed("second", "head"),
            r"it lacks head.weight; .* has second.weight, which the model does not have; .*strict=False loads",
        ),
        (
            nn.ReLU(),
            r"has first.weight, which the model does not have; there are none.*: give one of this model; strict",
        ),
    ]:
        with unchanged(model, tmp_path), pytest.raises(UnknownNameError, match=message):
            sc.load(file, into=model)


def test_what_fits_when_not_strict(file):
    model, saved = renamed("second", "head"), pruned(Wide)
    before = copy.deepcopy(model.state_dict())
    found = sc.load(file, into=model, strict=False)
    assert list(found) == ["first.weight", "first.bias"]
    assert same(model.state_dict()["first.weight"], saved.state_dict()["first.weight"])
    assert same(model.state_dict()["head.weight"], before["head.weight"])
    assert sc.load(file, into=nn.ReLU(), strict=False) == {}


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ(file, tmp_path, strict):
    for model, message in [
        (Wide(hidden=41), r"first.weight has the shape \(40, 40\) there, and \(41, 40\) here"),
        (Wide(outputs=6), r"second.weight has the shape \(10, 40\) there, and \(6, 40\) here"),
    ]:
        with (
            unchanged(model, tmp_path),
            pytest.raises(InputError, match=f"m.safetensors is of another model: {message}"),
        ):
            sc.load(file, into=model, strict=strict)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(20, 20, device="meta"), "weight is on the meta device and holds no values: materialise it first"),
        (nn.LazyLinear(20), "weight is lazy: run one batch through the model first"),
        (torch.ones(2), "expected a torch.nn.Module, got Tensor"),
        ({}, "expected a torch.nn.Module, got dict"),
    ],
)
def test_into_what_cannot_be_filled(tmp_path, model, message):
    sc.save(nn.Linear(20, 20), tmp_path / "m.safetensors")
    with pytest.raises(InputTypeError, match=message):
        sc.load(tmp_path / "m.safetensors", into=model)


def test_into_a_state_that_is_computed(tmp_path):
    for kind, name in ((Halved, "computed"), (Counted, "_extra_state")):
        model, fresh = build(kind), build(kind, seed=1)
        sc.save(model, tmp_path / "m.safetensors")
        message = (
            rf"{name} is computed by the model and cannot be filled in place: model.load_state_dict\(sc.load\(path\)\)"
        )
        with unchanged(fresh, tmp_path), pytest.raises(InputTypeError, match=message):
            sc.load(tmp_path / "m.safetensors", into=fresh)
        assert same(sc.load(tmp_path / "m.safetensors"), model.state_dict())
    fresh = build(Counted, seed=1)
    fresh.load_state_dict(sc.load(tmp_path / "m.safetensors"), strict=True)


def test_parametrizations_are_filled_behind_their_back(tmp_path):
    def make(seed):
        model = build(Wide, seed)
        parametrizations.weight_norm(model.first)
        parametrizations.spectral_norm(model.second)
        return model.eval()

    model, fresh = make(0), make(1)
    sc.save(model, tmp_path / "m.safetensors")
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert same(fresh.state_dict(), model.state_dict())
    assert torch.equal(fresh(example(model)), model(example(model)))


def test_into_a_buffer_whose_elements_share_memory(tmp_path):
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(20, 20))
            self.register_buffer("spread", torch.zeros(1).expand(300))

    sc.save({"weight": torch.ones(20, 20), "spread": torch.arange(300.0)}, tmp_path / "m.safetensors")
    model = Spread()
    with unchanged(model, tmp_path), pytest.raises(InputTypeError, match="spread"):
        sc.load(tmp_path / "m.safetensors", into=model)


def test_complex_numbers_into_real_ones(tmp_path):
    sc.save({"weight": torch.ones(20, 20), "bias": torch.ones(20, dtype=torch.complex64)}, tmp_path / "m.safetensors")
    model = nn.Linear(20, 20)
    with unchanged(model, tmp_path), pytest.raises((InputError, InputTypeError), match="bias"):
        sc.load(tmp_path / "m.safetensors", into=model)


# ---- damage -----------------------------------------------------------------------------------------------------


def test_truncated_files(file, tmp_path):
    whole, model = file.read_bytes(), build(Wide, seed=1)
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with unchanged(model, tmp_path):
            for how in ({}, {"into": model}, {"verify": True}, {"into": model, "strict": False}):
                with pytest.raises(
                    FileError, match=r"m.safetensors is damaged or cut short.*: copy or download it again"
                ):
                    sc.load(file, **how)
    file.write_bytes(whole + b"\0")
    with pytest.raises(FileError, match="damaged or cut short"):
        sc.load(file)


def test_a_model_is_as_it_was_after_a_damaged_file(file, tmp_path):
    forgery, model = Forgery.of(file), build(Wide, seed=1)
    forgery.data[forgery.place("second.bias").stop - 1] ^= 1  # the last tensor of the state
    forgery.save(file)
    with unchanged(model, tmp_path), pytest.raises(FileError, match=r"second.bias is damaged \(its checksum differs\)"):
        sc.load(file, into=model)


def test_verify_finds_what_no_checksum_tells(file, tmp_path):
    """A blob of other weights with a checksum to match: only what it decodes to is not what was saved."""
    model = build(Wide, seed=1)
    sc.save(pruned(Wide, seed=2), tmp_path / "other.safetensors")
    foreign = Forgery.of(tmp_path / "other.safetensors")
    for name in ("first.weight", "second.weight", "second.bias"):
        changed = Forgery.of(file)
        changed.splice(name, foreign.blob(name))
        changed.repair()
        forged = changed.save(tmp_path / "forged.safetensors")
        assert same(sc.load(forged)[name], pruned(Wide, seed=2).state_dict()[name])
        message = r"forged.safetensors: what it decodes to is not what was saved: copy or download it again"
        with unchanged(model, tmp_path):
            for how in ({}, {"into": model}):
                with pytest.raises(FileError, match=message):
                    sc.load(forged, verify=True, **how)


@pytest.mark.parametrize("error", [IndexError, KeyError, MemoryError])
def test_no_error_of_a_block_is_lost_among_threads(file, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error("a bug")

    monkeypatch.setattr(coding.Decoder, "__call__", fail)
    with pytest.raises(error, match="a bug"):
        sc.load(file)


# ---- writing ----------------------------------------------------------------------------------------------------


def test_a_target_that_is_a_folder_or_has_none(tmp_path):
    (tmp_path / "m.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in [
        ("m.safetensors", "is a folder: give the name of a file in it"),
        ("nowhere/m.safetensors", r"was not written \(No such file or directory\).*: make its folder first"),
        ("file/m.safetensors", r"was not written \(Not a directory\)"),
    ]:
        with pytest.raises(WriteError, match=message):
            sc.save(build(Wide), tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "m.safetensors"]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (MemoryError("no room"), MemoryError, r"^no room$"),
        (KeyboardInterrupt("a key"), KeyboardInterrupt, r"^a key$"),
        (
            OSError(28, "No space left on device"),
            WriteError,
            r"\(No space left on device\).*see to room and permissions",
        ),
    ],
)
def test_an_old_file_outlives_a_save_that_fails(file, tmp_path, monkeypatch, error, expected, message):
    def fail(*_):
        raise error

    model = build(Net)
    monkeypatch.setattr(coding, "encode", fail)
    with unchanged(model, tmp_path), pytest.raises(expected, match=message):
        sc.save(model, file)


FULL = """
import resource, sys
import torch
import secateur as sc
from secateur.errors import WriteError

torch.manual_seed(1)
model = torch.nn.Linear(300, 300)
for limit in (0, 100, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        sc.save(model, sys.argv[1])
    except WriteError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a full disk is played as Linux does")
def test_a_full_disk(file, tmp_path):
    whole = file.read_bytes()
    done = subprocess.run([sys.executable, "-W", "error", "-c", FULL, file], capture_output=True, text=True)
    message = (
        "m.safetensors was not written (File too large), and what was there is intact: see to room and permissions"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(message) == 3
    assert file.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_more_than_the_memory_that_is_free(file, monkeypatch):
    monkeypatch.setattr("secateur.storage.archive.free_memory", lambda: 100)
    with pytest.raises(InputError, match=r"takes .* of memory, and 100 B are free: load it into a model"):
        sc.load(file)
