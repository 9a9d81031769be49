"""Sparse LSTM, GRU and plain RNN in every setting, packed sequences and states among them."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from secateur.runtime import candidates, products
from secateur.runtime.recurrences import SparseGRU, SparseLSTM, SparseRNN
from sparse_models import off, sparse, thin

SETTINGS = [
    {"kind": kind, "num_layers": layers, "bidirectional": both, "proj_size": proj, "batch_first": first, "bias": bias}
    for kind, layers, both, proj, first, bias in itertools.product(
        ["LSTM", "GRU", "RNN"], [1, 2], [False, True], [0, 5], [False, True], [True, False]
    )
    if kind == "LSTM" or not proj
]


def build(kind="LSTM", inputs=17, hidden=19, proj_size=0, **options):
    if kind == "LSTM":
        options["proj_size"] = proj_size
    return thin(getattr(nn, kind)(inputs, hidden, **options))


def states(layer, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size, generator=generator)
    if not isinstance(layer, nn.LSTM):
        return h
    return h, torch.randn(count, batch, layer.hidden_size, generator=generator)


def double(nest):
    if isinstance(nest, PackedSequence):
        return nest.to(torch.float64)
    return tuple(map(double, nest)) if isinstance(nest, tuple) else nest.double()


def same(got, reference):
    if isinstance(reference, PackedSequence):
        assert isinstance(got, PackedSequence)
        for mine, theirs in zip(got[1:], reference[1:], strict=True):
            assert mine is theirs is None or mine.equal(theirs)
        return same(got.data, reference.data)
    if isinstance(reference, tuple):
        assert isinstance(got, tuple)
        assert len(got) == len(reference)
        return all(same(*pair) for pair in zip(got, reference, strict=True))
    assert got.dtype is torch.float32
    assert off(got, reference) <= 1e-5
    return True


def check(layer, x, hx=None):
    fast = sparse(layer)
    before = copy.deepcopy((x, hx))
    with torch.no_grad():
        got = fast(x) if hx is None else fast(x, hx)
        exact = copy.deepcopy(layer).double()
        assert same(got, exact(double(x)) if hx is None else exact(double(x), double(hx)))
    assert same(x, double(before[0]))  # nothing was written into
    assert hx is None or same(hx, double(before[1]))


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("given", [False, True])
def test_padded(isa, options, given):
    layer = build(**options)
    shape = (3, 6) if layer.batch_first else (6, 3)
    check(layer, torch.randn(*shape, 17), states(layer, 3) if given else None)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o.values())))
def test_packed(isa, options):
    layer = build(**options)
    unsorted = pack_sequence([torch.randn(n, 17) for n in (2, 6, 1, 4)], enforce_sorted=False)
    check(layer, unsorted)
    check(layer, unsorted, states(layer, 4))
    check(layer, pack_sequence([torch.randn(n, 17) for n in (5, 5, 2)]), states(layer, 3))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("first", [False, True])
def test_without_a_batch(isa, kind, first):
    layer = build(kind, batch_first=first, num_layers=2, bidirectional=True)
    given = states(layer, 1)
    one = tuple(state[:, 0] for state in given) if kind == "LSTM" else given[:, 0]
    check(layer, torch.randn(6, 17))
    check(layer, torch.randn(6, 17), one)


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batches(isa, kind, batch):
    check(build(kind, 33, 64), torch.randn(5, batch, 33))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 3), (100, 17), (64, 128)], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_sizes_and_patterns(isa, kind, sizes, sparsity):
    layer = thin(getattr(nn, kind)(*sizes, num_layers=2), sparsity)
    with torch.no_grad():  # so that it is tried
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l1.zero_()
    check(layer, torch.randn(4, 3, sizes[0]))


def test_a_dense_input_matrix_is_not_packed(isa):
    layer = build()
    nn.init.normal_(layer.weight_ih_l0)
    fast = sparse(layer)
    assert list(fast._buffers) == ["packed_weight_hh_l0"]
    check(layer, torch.randn(6, 3, 17))


def test_not_contiguous(isa):
    layer = build()
    check(
        layer,
        torch.randn(3, 17, 6).permute(2, 0, 1),
        tuple(s.transpose(1, 2).contiguous().transpose(1, 2) for s in states(layer, 3)),
    )


@pytest.mark.parametrize("shape", [(0, 3, 17), (6, 3, 16), (6, 17, 1, 1), (17,)], ids=str)
def test_what_torch_refuses_is_refused(isa, shape):
    layer, x = build(), torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError), match=r".+") as plain:
        layer(x)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(str(plain.value))) as ours:
        sparse(layer)(x)
    assert str(ours.value) == str(plain.value)


def test_states_of_another_size_are_refused(isa):
    layer, x = build(), torch.randn(6, 3, 17)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        sparse(layer)(x, states(layer, 4))


def test_an_empty_batch(isa):
    layer = build()
    out, (h, c) = sparse(layer)(torch.randn(6, 0, 17))
    assert out.shape == (6, 0, 19)
    assert h.shape == c.shape == (1, 0, 19)


def test_dropout_in_training_goes_dense(isa):
    fast = sparse(build(num_layers=2, dropout=0.5))
    fast.train()
    x = torch.randn(6, 3, 17)
    with torch.no_grad():
        assert not fast(x)[0].equal(fast(x)[0])


def test_choices_go_by_batch(isa):
    layer = build()
    fast, x = sparse(layer), torch.randn(6, 3, 17)
    assert (fast.rows(x), fast.rows(x[:, 0])) == (3, 1)
    assert fast.rows(pack_padded_sequence(x, [6, 2, 1])) == 3
    fast._choices = 1 << products.bucket(1)
    with torch.no_grad():
        assert fast(x)[0].equal(layer(x)[0])  # dense, to the bit


def test_classes(isa):
    assert isinstance(sparse(build()), SparseLSTM)
    assert isinstance(sparse(build("GRU")), SparseGRU)
    assert isinstance(sparse(build("RNN")), SparseRNN)


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_relu_in_place_of_tanh(isa, batch):
    layer = build("RNN", num_layers=2, bidirectional=True, nonlinearity="relu")
    check(layer, torch.randn(6, batch, 17), states(layer, batch))


def test_without_the_library_they_stay_dense(without_native):
    (plan,) = candidates.survey(build())
    assert plan.reason == "a recurrent layer needs the native library"
