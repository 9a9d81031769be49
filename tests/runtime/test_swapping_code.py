"""Generated code in layers: tried where it may pay, chosen by its times, made anew in copies."""

import copy
import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import secateur as sc
from secateur.runtime import native, products, tuner, tuning
from secateur.runtime.chains import SparseSequential
from secateur.runtime.kernel_plans import Gain, KernelPlan
from secateur.runtime.swapping import swap
from sparse_models import fake_times, off, sparse, thin

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")


@pytest.fixture
def generating(monkeypatch):
    """Generate code whose sums are computed without it, so that all around it is as where it runs."""
    made, real = [], native.generate

    def generate(blob, shape=None, adds=False, run=1):
        made.append(blob)
        return real(blob, shape, adds, run=2)

    monkeypatch.setattr(native, "generate", generate)
    monkeypatch.setattr(native, "generates", lambda: True)
    return made


@pytest.fixture
def accelerated(monkeypatch):
    """Accelerate with given times (dense, sparse, generated) of a layer for a row class."""

    def run(model, x, times, **given):
        monkeypatch.setattr(tuning, "_CACHE", {})
        monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
        fake_times(monkeypatch, times)
        return sc.accelerate(model, x, **given)

    return run


def test_chosen_where_it_is_fastest(generating, accelerated):
    model = thin(nn.Sequential(nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 48)))
    fast = accelerated(model, torch.randn(32, 64), lambda name, _: (3.0, 2.0, 1.0) if name == "0" else (3.0, 1.0, 2.0))
    first, _, last = fast
    assert first._codes["weight"].choices
    assert not last._codes
    assert [layer.generated > 0 for layer in fast.plan.layers] == [True, False]
    assert "generated" in str(fast.plan)
    x = torch.randn(40, 64)
    assert off(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize(("given", "rows"), [({"generated": False}, 32), ({}, 8)])
def test_not_made_where_it_cannot_pay_or_is_not_wanted(generating, accelerated, given, rows):
    fast = accelerated(thin(nn.Sequential(nn.Linear(64, 64))), torch.randn(rows, 64), lambda *_: (3.0, 2.0), **given)
    assert not generating
    assert not fast[0]._codes


def test_code_beyond_the_cache_is_not_made_for_few_rows(generating, accelerated, monkeypatch):
    monkeypatch.setattr(tuner, "last_level_cache", lambda: 1000)
    model = thin(nn.Sequential(nn.Linear(64, 64)))
    accelerated(model, torch.randn(32, 64), lambda *_: (3.0, 2.0))
    assert not generating
    accelerated(model, torch.randn(33, 64), lambda *_: (3.0, 2.0, 1.0))
    assert generating


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fast: _saved(fast)])
def test_copies_have_code_of_their_own(generating, accelerated, copied):
    model = thin(nn.Sequential(nn.Linear(64, 64)))
    fast = accelerated(model, torch.randn(32, 64), lambda *_: (3.0, 2.0, 1.0))
    other = copied(fast)
    code, own = fast[0]._codes["weight"], other[0]._codes["weight"]
    assert own.handle != code.handle
    assert own.choices == code.choices
    assert own.blob is other[0].packed_weight
    del fast, code
    x = torch.randn(32, 64)
    assert off(other(x), model(x)) < 1e-5


def _saved(fast):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_loaded_where_code_cannot_run(generating, accelerated, monkeypatch):
    model = thin(nn.Sequential(nn.Linear(64, 64)))
    fast = accelerated(model, torch.randn(32, 64), lambda *_: (3.0, 2.0, 1.0))
    monkeypatch.setattr(native, "generate", lambda *_: None)
    other = copy.deepcopy(fast)
    assert not other[0]._codes
    x = torch.randn(32, 64)
    assert off(other(x), model(x)) < 1e-5


def test_the_plan_makes_it_again(generating, accelerated):
    model = thin(nn.Sequential(nn.Linear(64, 64)))
    fast = accelerated(model, torch.randn(32, 64), lambda *_: (3.0, 2.0, 1.0))
    plan = KernelPlan.from_dict(fast.plan.to_dict())
    assert plan == fast.plan
    again = sc.accelerate(model, torch.randn(32, 64), plan=plan)
    assert again[0]._codes["weight"].choices == fast[0]._codes["weight"].choices
    assert sc.dense(again)[0].__class__ is nn.Linear


def test_attention_and_gpt2_layers_take_it(generating):
    layer = sparse(thin(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)))
    attention = layer.self_attn
    attention.generate()
    attention.choose(products.ALL, products.ALL)
    assert set(attention._codes) == {"in", "out"}
    x = torch.randn(2, 20, 32)
    plain = attention(x, x, x)[0]
    attention.choose(products.ALL, 0)
    assert off(plain, attention(x, x, x)[0]) < 1e-5


def generated(layer):
    """The layer with code for all numbers of rows."""
    layer.generate()
    layer.choose(products.ALL, products.ALL)
    assert layer._codes
    return layer


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_linear_layers_of_any_size(generating, isa, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(0)
    for rows, columns, bias in ((1, 1, True), (16, 500, False), (300, 130, True), (29, 7, True), (2000, 1030, True)):
        model = thin(nn.Sequential(nn.Linear(columns, rows, bias=bias)))
        layer = generated(sparse(model)[0])
        for n in (1, 11, 12, 16, 17, 27, 28, 45, 150):
            x = torch.randn(n, columns, generator=draw)
            assert off(layer(x), model.double()(x.double())) < 1e-5, (rows, columns, n)
            model.float()


IMAGES = [  # channels, height, width, and what the layer is made with
    (3, 9, 11, {"kernel_size": 3, "padding": 1}),
    (4, 17, 18, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    (6, 4, 5, {"kernel_size": 1}),
    (6, 3, 5, {"kernel_size": 1}),
    (8, 14, 14, {"kernel_size": 1}),
    (2, 12, 30, {"kernel_size": (5, 3), "dilation": (1, 2), "padding": "same"}),
    (64, 28, 28, {"kernel_size": 3, "padding": 1}),  # these by shifted sums
    (6, 5, 42, {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False}),
    (1, 1, 14, {"kernel_size": 3, "padding": 1}),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("channels", "height", "width", "given"), IMAGES)
def test_convolutions_of_any_shape(generating, isa, threads, channels, height, width, given, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = thin(nn.Sequential(nn.Conv2d(channels, 40, **given)))
    layer = sparse(model)[0]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, height, width, generator=draw)
    layer.observe(x)
    generated(layer)
    assert off(layer(x), model.double()(x.double())) < 1e-5
    other = torch.randn(1, channels, height + 3, width, generator=draw)  # of another shape: by today's kernels
    assert off(layer(other), model(other.double())) < 1e-5


def test_no_code_for_a_layer_that_sees_images_of_several_sizes(generating):
    layer = sparse(thin(nn.Sequential(nn.Conv1d(8, 8, 3))))[0]
    for length in (30, 40):
        layer.observe(torch.randn(1, 8, length))
    layer.generate()
    assert not layer._codes


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_of_layers(generating, isa, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    widths = (100, 300, 64, 17)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = thin(nn.Sequential(*layers))
    fast = sparse(model)
    for place in (0, 4):  # the one between has none
        generated(fast[place])
    swap(fast, SparseSequential)
    (chain,) = fast.fuse({(0, 6): products.ALL})
    for n in (1, 12, 15, 33, 47, 200):
        x = torch.randn(n, 100, generator=torch.Generator().manual_seed(n))
        assert off(fast(x), model.double()(x.double())) < 1e-5, n
        model.float()
    assert chain._handles[1] == products.ALL


RECURRENT = [
    (nn.LSTM, {"num_layers": 2}),
    (nn.LSTM, {"proj_size": 11, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "given"), RECURRENT)
def test_recurrent_layers(generating, isa, threads, kind, given, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = thin(nn.Sequential(kind(20, 30, **given)))
    layer = generated(sparse(model)[0])
    for batch in (1, 3, 12, 16, 33):
        x = torch.randn(*((batch, 9) if layer.batch_first else (9, batch)), 20)
        assert all(off(a, b) < 1e-5 for a, b in zip(_flat(layer(x)), _flat(model[0](x)), strict=True)), batch
    lengths = torch.tensor([9, 9, 7, 7, 7, 5, 5, 5, 4, 4, 4, 3, 2, 1])
    x = pack_padded_sequence(torch.randn(9, 14, 20), lengths)
    assert all(off(a, b) < 1e-5 for a, b in zip(_flat(layer(x)), _flat(model[0](x)), strict=True))


def _flat(found):
    out, last = found
    return [out.data if isinstance(out, PackedSequence) else out, *(last if isinstance(last, tuple) else (last,))]


def test_threads_share_code(generating):
    model = thin(nn.Sequential(nn.Linear(200, 100)))
    layer = generated(sparse(model)[0])
    x = [torch.randn(40, 200) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(layer, x))
    assert all(off(y, model(seen)) < 1e-5 for y, seen in zip(found, x, strict=True))


@pytest.mark.parametrize("run", [1, 2] if native.generates() else [2])  # 1 where there is AVX-512
def test_code_runs(run, monkeypatch):
    real = native.generate
    monkeypatch.setattr(native, "generate", lambda blob, shape=None, adds=False: real(blob, shape, adds, run))
    for rows, columns, n in ((300, 130, 40), (29, 7, 12), (2000, 1030, 150)):
        model = thin(nn.Sequential(nn.Linear(columns, rows)))
        layer = generated(sparse(model)[0])
        x = torch.randn(n, columns)
        assert off(layer(x), model.double()(x.double())) < 1e-5
        model.float()
