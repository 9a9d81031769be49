"""secateur.storage.archive: a model's state comes back as it was, into whatever it is asked to go, or not at all."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from forgery import PACKED, Forgery
from hypothesis import given, settings
from hypothesis import strategies as st
from oddities import tensor, words
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import secateur as sc
from models import MODELS, LanguageModel, Mlp, Net, Tagger, build, example, same
from secateur.errors import FileError, InputError, InputTypeError, UnknownNameError, WriteError
from secateur.storage import coding
from secateur.storage.checkpoints import inspect
from secateur.storage.coding import BLOCK
from secateur.storage.dtypes import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

LEVELS = "lossless", "fp16", "bf16", "near", "small", "tiny"


class Recurrent(nn.Module):
    """LSTM and GRU, both ways, with a projection, in cells."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(20, 24, 2, bidirectional=True, proj_size=8)
        self.gru = nn.GRU(16, 20, bidirectional=True)
        self.cell = nn.GRUCell(20, 20)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]

    @staticmethod
    def example(generator):
        return torch.randn(5, 3, 20, generator=generator)


class Shared(nn.Module):
    """One Linear under two names, between weights tied in three."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 20, padding_idx=0)
        self.first = nn.Linear(20, 20)
        self.again = self.first
        self.decoder = nn.Linear(20, 40, bias=False)
        self.other = nn.Linear(20, 40)
        self.decoder.weight = self.other.weight = self.embed.weight

    def forward(self, tokens):
        inner = self.again(self.first(self.embed(tokens)).relu())
        return self.decoder(inner) + self.other(inner)

    @staticmethod
    def example(generator):
        return torch.randint(0, 40, (4, 7), generator=generator)


class Odd(nn.Module):
    """Parameters and buffers of all dtypes, sizes and strides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(16)
        self.across = nn.Parameter(torch.randn(30, 20).t())
        self.every_other = nn.Parameter(torch.randn(40, 40)[::2, 1::2])
        self.brain = nn.Parameter(torch.randn(20, 20).to(torch.bfloat16))
        self.twice = nn.Parameter(torch.randn(20, 20).double())
        self.waves = nn.Parameter(torch.randn(20, 20, dtype=torch.complex64))
        self.finer = nn.Parameter(torch.randn(20, 20, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.register_buffer("no_rows", torch.zeros(0, 5))
        self.frozen = nn.Parameter(torch.randn(20, 20), requires_grad=False)
        self.register_buffer("mask", torch.randn(20, 20) > 0)
        self.register_buffer("steps", torch.tensor(12))
        self.register_buffer("index", torch.arange(1000))
        self.register_buffer("small", torch.arange(-100, 100, dtype=torch.int8).repeat(3))
        self.register_buffer("eight", torch.randn(20, 20).to(torch.float8_e4m3fn))
        self.register_buffer("powers", torch.arange(100, 200, dtype=torch.uint8).repeat(4).view(torch.float8_e8m0fnu))
        self.register_buffer("four", torch.arange(256, dtype=torch.uint8).repeat(2).view(torch.float4_e2m1fn_x2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.scale

    @staticmethod
    def example(generator):
        return torch.randn(2, 8, 6, 6, generator=generator)


class Wide(Mlp):
    """An Mlp whose weights are worth packing."""

    def __init__(self, hidden=40, outputs=10):
        super().__init__(40, hidden, outputs)


ZOO = [*MODELS, Recurrent, Shared, Odd]


def pruned(kind, seed=0):
    model = build(kind, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.errors.SecateurWarning)
        sc.prune(model, 0.9)
    return model.eval()


def face(model):
    """All that must not change when weights are filled in."""
    return [
        [(n, id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad, t.is_leaf) for n, t in named]
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    ] + [[id(w) for w in m._flat_weights] for m in model.modules() if isinstance(m, nn.RNNBase)]


@contextlib.contextmanager
def unchanged(model, folder):
    """See that neither a model nor a folder is other than before."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else dict(model)
    held = {name: tensor for name, tensor in state.items() if type(tensor) in (torch.Tensor, nn.Parameter)}
    held = {n: t for n, t in held.items() if t.layout is torch.strided and not (t.is_meta or t.is_quantized)}
    before = {n: (t.detach().clone(), None if t.is_inference() else t._version, id(t)) for n, t in held.items()}
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield
    for name, (value, version, identity) in before.items():
        now = held[name]
        assert same(value, now), name
        assert (None if now.is_inference() else now._version, id(now)) == (version, identity), name
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


# ---- a zoo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", ["fast", "normal", "best"])
@pytest.mark.parametrize("kind", ZOO)
def test_a_state_comes_back_to_the_bit(tmp_path, kind, effort):
    model = pruned(kind)
    with unchanged(model, tmp_path / "none"):
        sc.save(model, tmp_path / "m.safetensors", effort=effort)
    state, found = model.state_dict(), sc.load(tmp_path / "m.safetensors", verify=True)
    assert list(found) == list(state)
    assert same(found, state)
    assert all(type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in found.values())
    fresh = kind().eval()
    fresh.load_state_dict(found, strict=True)
    assert torch.equal(fresh(example(model)), model(example(model)))


@pytest.mark.parametrize("kind", ZOO)
def test_into_a_model_that_stays_what_it_is(tmp_path, kind):
    model, fresh = pruned(kind), build(kind, seed=1).eval()
    for parameter in list(fresh.parameters())[::2]:
        parameter.requires_grad_(False)
    sc.save(model, tmp_path / "m.safetensors")
    before = face(fresh)
    versions = {n: t._version for n, t in fresh.state_dict(keep_vars=True).items()}
    found = sc.load(tmp_path / "m.safetensors", into=fresh)
    assert face(fresh) == before
    assert same(fresh.state_dict(), model.state_dict())
    assert torch.equal(fresh(example(model)), model(example(model)))
    now = fresh.state_dict(keep_vars=True)
    assert all(now[name]._version > versions[name] for name in versions)
    assert list(found) == list(now)
    assert all(found[name].data_ptr() == now[name].data_ptr() for name in now)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        *(compiled, nn.DataParallel, torch.optim.swa_utils.AveragedModel),
        *(lambda model: compiled(nn.DataParallel(model)), lambda model: nn.DataParallel(compiled(model))),
    ],
)
def test_into_a_model_through_its_wrappers(tmp_path, wrap):
    model, fresh = pruned(Mlp), wrap(build(Mlp, seed=1))
    plain, wrapped = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    sc.save(model, plain)
    sc.save(wrap(model), wrapped)
    assert wrapped.read_bytes() == plain.read_bytes()
    assert list(sc.load(plain, into=fresh)) == list(model.state_dict())
    sc.save(fresh, wrapped)
    assert wrapped.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_into_a_model_of_another_dtype(tmp_path, dtype):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Net, seed=1).to(dtype)
    before = face(fresh)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert face(fresh) == before
    assert same(fresh.state_dict(), model.to(dtype).state_dict())


def test_into_a_model_of_another_memory_format(tmp_path):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Net, seed=1).to(memory_format=torch.channels_last)
    strides = {n: t.stride() for n, t in fresh.state_dict().items()}
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert {n: t.stride() for n, t in fresh.state_dict().items()} == strides
    assert same(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("inside", [True, False])
def test_into_a_model_of_inference_mode(tmp_path, inside):
    model = pruned(Mlp)
    sc.save(model, tmp_path / "m.safetensors")
    with torch.inference_mode():
        fresh = build(Mlp, seed=1)
    with torch.inference_mode(inside):
        sc.load(tmp_path / "m.safetensors", into=fresh)
        sc.save(fresh, tmp_path / "again.safetensors")
    assert same(sc.load(tmp_path / "again.safetensors"), model.state_dict())


def test_several_blocks_into_a_model(tmp_path):
    model = nn.Linear(3000, 1100)
    sc.prune(model, 0.5)
    sc.save(model, tmp_path / "m.safetensors", effort="fast")
    fresh, turned = nn.Linear(3000, 1100), nn.Linear(1, 1)
    turned.weight, turned.bias = nn.Parameter(torch.zeros(3000, 1100).t()), nn.Parameter(torch.zeros(1100))
    for target in (fresh, turned):
        sc.load(tmp_path / "m.safetensors", into=target)
        assert same(target.state_dict(), model.state_dict())


def test_autograd_is_told_of_weights_that_changed_under_it(tmp_path):
    model = pruned(Mlp)
    sc.save(model, tmp_path / "m.safetensors")
    out = model(example(model)).sum()
    sc.load(tmp_path / "m.safetensors", into=model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    model(example(model)).sum().backward()
    assert model.first.weight.grad is not None


def test_an_optimizer_keeps_its_grip(tmp_path):
    model = pruned(Tagger)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Tagger, seed=1)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    fresh(example(fresh)).sum().backward()
    optimizer.step()
    assert not same(fresh.state_dict(), model.state_dict())


# ---- tied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LanguageModel, Shared])
def test_tied_weights_are_one_object_stored_once(tmp_path, kind):
    model = pruned(kind)
    written = {t.name: t for t in sc.save(model, tmp_path / "m.safetensors").tensors}
    found = sc.load(tmp_path / "m.safetensors")
    assert found["decoder.weight"] is found["embed.weight"]
    assert (written["decoder.weight"].coding, written["decoder.weight"].stored_bytes) == ("tied to embed.weight", 0)
    assert written["decoder.weight"].zeros == written["embed.weight"].zeros > 0
    assert set(Forgery.of(tmp_path / "m.safetensors").slots).isdisjoint({"decoder.weight", f"decoder.weight{PACKED}"})
    fresh = build(kind, seed=1)
    back = sc.load(tmp_path / "m.safetensors", into=fresh)
    assert back["decoder.weight"].data_ptr() == fresh.embed.weight.data_ptr() == fresh.decoder.weight.data_ptr()
    assert fresh.decoder.weight is fresh.embed.weight


def test_tied_there_and_not_here_and_the_other_way_round(tmp_path):
    tied, loose = pruned(LanguageModel), build(LanguageModel, seed=1)
    loose.decoder.weight = nn.Parameter(loose.decoder.weight.detach().clone())
    sc.save(tied, tmp_path / "tied.safetensors")
    sc.load(tmp_path / "tied.safetensors", into=loose)
    assert same(loose.state_dict(), tied.state_dict())
    assert loose.decoder.weight is not loose.embed.weight

    sc.save({n: t.clone() for n, t in tied.state_dict().items()}, tmp_path / "loose.safetensors")
    again = build(LanguageModel, seed=2)
    sc.load(tmp_path / "loose.safetensors", into=again)
    assert same(again.state_dict(), tied.state_dict())


def test_two_values_for_one_weight(tmp_path):
    """A file in which they differ, into a model in which they are one: the last wins, as in torch, on any threads."""
    first, last = torch.randn(2, BLOCK), torch.ones(2, BLOCK)  # slow to read and fast
    sc.save({"a": first, "b": last}, tmp_path / "m.safetensors", effort="fast")
    model = nn.ParameterDict({"a": nn.Parameter(first.clone())})
    model["b"] = model["a"]
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for _ in range(5):
            sc.load(tmp_path / "m.safetensors", into=model)
            assert torch.equal(model["a"], last)
    finally:
        torch.set_num_threads(threads)


def test_one_name_of_a_tied_tensor_is_enough(tmp_path):
    model = pruned(LanguageModel)
    state = model.state_dict()
    del state["decoder.weight"]
    sc.save(state, tmp_path / "m.safetensors")
    fresh = build(LanguageModel, seed=1)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert same(fresh.state_dict(), model.state_dict())


def test_what_is_tied_and_what_only_looks_so(tmp_path):
    square = torch.randn(40, 40)
    complex_ = torch.randn(40, 40, dtype=torch.complex64)
    state = {
        "square": square,
        "same": square.detach(),
        "across": square.t(),
        "also across": square.t(),
        "upper": square[:20],
        "lower": square[20:],
        "bits": square.view(torch.int32),
        "line": square.view(-1),
        "waves": complex_,
        "conjugate": complex_.conj(),
        "again": complex_.conj(),
        "real": complex_.real,
        "imaginary": complex_.imag,
        "negative": complex_.conj().imag,
        "spread": torch.ones(1).expand(400),
        "none": torch.empty(0),
        "nor": torch.empty(0),
    }
    sc.save(state, tmp_path / "m.safetensors")
    found = sc.load(tmp_path / "m.safetensors", verify=True)
    assert same(found, {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items()})
    assert found["same"] is found["square"]
    assert found["also across"] is found["across"]
    assert found["conjugate"] is not found["waves"]
    assert found["square"].data_ptr() != found["across"].data_ptr()


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
        (lambda: 3, "odd is a int: a .safetensors file holds tensors by name; save it elsewhere"),
        (lambda: None, "odd is a NoneType: a .safetensors file holds tensors by name; save it elsewhere"),
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
        (None, "save takes a module or a state_dict, not a NoneType"),
    ],
)
def test_what_has_no_state(tmp_path, model, message):
    with pytest.raises(InputTypeError, match=message):
        sc.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m", "m.pt", "m.safetensor", "m.safetensors.gz", "safetensors", ".safetensors"])
def test_another_suffix(tmp_path, name):
    with pytest.raises(InputError, match=r"a packed file is a .safetensors file, so let its name end so"):
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
            r"it lacks head.weight; .* and has second.weight, which the model has not; .*strict=False loads what fits",
        ),
        (nn.ReLU(), r"has first.weight, which the model has not; there are none to choose from; strict=False"),
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


# ---- other files ------------------------------------------------------------------------------------------------


def test_files_that_were_never_packed(tmp_path):
    model = pruned(Net)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "m.pth")
    for name in ("m.safetensors", "m.pt", "m.pth"):
        assert same(sc.load(tmp_path / name, verify=True), model.state_dict())
        fresh = build(Net, seed=1)
        before = face(fresh)
        sc.load(tmp_path / name, into=fresh)
        assert face(fresh) == before
        assert same(fresh.state_dict(), model.state_dict())


def test_what_was_loaded_has_nothing_more_to_do_with_the_file(tmp_path):
    state = {"w": torch.randn(30, 30)}
    sc.save(state, tmp_path / "m.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for name in ("m.safetensors", "plain.safetensors", "m.pt"):
        found = sc.load(tmp_path / name)
        found["w"].zero_()
        assert same(sc.load(tmp_path / name), state)
        sc.save(sc.load(tmp_path / name), tmp_path / "m.safetensors")
        os.truncate(tmp_path / name, 0)
        assert not found["w"].any()
        sc.save(state, tmp_path / "m.safetensors")


def test_from_a_file_into_itself(tmp_path):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    once = (tmp_path / "m.safetensors").read_bytes()
    sc.save(sc.load(tmp_path / "m.safetensors"), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == once


@pytest.mark.parametrize(
    ("code", "shape", "data"),
    [
        ("F4", [2, 3], b"abc"),  # rows of one and a half bytes
        ("F32", [0, 2**62, 4], b""),
        ("F32", [2**64 - 1, 0], b""),
        ("F6_E2M3", [4], b"abc"),
    ],
)
def test_plain_tensors_that_torch_has_not(tmp_path, code, shape, data):
    slot = {"dtype": code, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"odd": slot}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    for read in (sc.load, inspect):
        with pytest.raises(InputError, match=r"m.safetensors.*odd is"):
            read(tmp_path / "m.safetensors")


def test_missing_files_and_other_kinds(tmp_path):
    (tmp_path / "m.h5").touch()
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nowhere.safetensors", "no such file"),
        ("m.h5", "unknown suffix '.h5': give .safetensors"),
        ("folder", "is a folder without an index"),
    ]:
        with pytest.raises(InputError, match=message):
            sc.load(tmp_path / name)


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


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_old_file_outlives_a_save_that_fails(file, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    model = build(Net)
    monkeypatch.setattr(coding, "encode", fail)
    expected = WriteError if isinstance(error, OSError) else type(error)
    with unchanged(model, tmp_path), pytest.raises(expected):
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


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_state_comes_back(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("any") / "m.safetensors"
    state = {}
    for name in data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, min_size=1)
    ):
        dtype = data.draw(st.sampled_from(list(KINDS)))
        shape = data.draw(
            st.sampled_from(
                [(), (0,), (1,), (3, 0, 2), (255,), (256,), (7, 41), (2, 3, 5, 11), (1000,), (1,) * 70 + (300,)]
            )
        )
        sparsity, seed = data.draw(st.sampled_from([0, 0.5, 0.9, 1])), data.draw(st.integers(0, 99))
        size = int(np.prod(shape))
        flat = tensor(words(dtype, size, sparsity, seed), dtype) if size else torch.empty(0, dtype=dtype)
        state[name] = flat.reshape(shape)
    written = sc.save(state, file, effort="fast")
    found = sc.load(file, verify=True)
    assert list(found) == list(state)
    assert same(found, state)
    assert written.file_bytes == file.stat().st_size


def test_blocks_are_read_in_place(tmp_path):
    """Nothing of the size of the model is allocated on the way in."""
    model = nn.Linear(1500, 1500, bias=False)
    sc.prune(model, 0.9)
    sc.save(model, tmp_path / "m.safetensors", effort="fast")
    assert model.weight.numel() > BLOCK
    place = model.weight.data_ptr()
    with torch.no_grad():
        model.weight.fill_(7)
    assert sc.load(tmp_path / "m.safetensors", into=model)["weight"].data_ptr() == place
    assert model.weight.count_nonzero() == model.weight.numel() // 10
