"""Sparse projections of attention with every mask and layout."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from secateur.runtime import candidates, products
from sparse_models import off, sparse, thin

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def build(**options):
    torch.manual_seed(0)
    return thin(nn.MultiheadAttention(24, 4, **options), 0.7)


def apart(layer):
    """Sparse, for query, key and value that differ."""
    fast = sparse(layer)
    for name in [name for name in fast._buffers if name.startswith("packed_")]:
        delattr(fast, name)
    fast._apart = True
    fast.pack()
    return fast


def check(layer, fast, *args, **kwargs):
    exact = copy.deepcopy(layer).double()
    as_double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()
    }
    with torch.no_grad():
        reference, weights = exact(*(x.double() for x in args), **as_double)
        got, mine = fast(*args, **kwargs)
    assert off(got, reference) <= 1e-5
    assert (mine is None) == (weights is None)
    if mine is not None:
        assert off(mine, weights) <= 1e-5


MASKS = {
    "none": lambda b, q, s: {},
    "bool": lambda b, q, s: {"attn_mask": torch.ones(q, s, dtype=torch.bool).triu(s - q + 1)},
    "float": lambda b, q, s: {"attn_mask": torch.randn(q, s)},
    "by head": lambda b, q, s: {"attn_mask": torch.randn(b * 4, q, s)},
    "padding": lambda b, q, s: {"key_padding_mask": torch.arange(s).expand(b, s) > s - 2},
    "both": lambda b, q, s: {
        "attn_mask": torch.ones(q, s, dtype=torch.bool).triu(s - q + 1),
        "key_padding_mask": torch.arange(s).expand(b, s) > s - 2,
    },
    "causal": lambda b, q, s: {"attn_mask": nn.Transformer.generate_square_subsequent_mask(s)[:q], "is_causal": q == s},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_of_oneself(backend, first, mask, weights):
    layer = build(batch_first=first)
    x = torch.randn((3, 5, 24) if first else (5, 3, 24))
    fast, kwargs = sparse(layer), {**MASKS[mask](3, 5, 5), **weights}
    assert fast._takes(x, x, x, kwargs.get("key_padding_mask"), kwargs.get("attn_mask"), False)
    with torch.no_grad():
        out, _ = fast(x, x, x, **kwargs)
    exact = copy.deepcopy(layer).double()
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    y = x.double()
    assert off(out, exact(y, y, y, **wide)[0]) <= 1e-5
    check(layer, apart(layer), x, x, x, **kwargs)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("other", [{}, {"kdim": 10, "vdim": 7}, {"bias": False}], ids=str)
@pytest.mark.parametrize("need", [True, False])
def test_of_another(backend, first, mask, other, need):
    layer = build(batch_first=first, **other)
    q, k, v = torch.randn(3, 5, 24), torch.randn(3, 7, layer.kdim), torch.randn(3, 7, layer.vdim)
    if not first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    check(layer, apart(layer), q, k, v, need_weights=need, **MASKS[mask](3, 5, 7))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("need", [True, False])
def test_without_a_batch(backend, first, need):
    layer, x, y = build(batch_first=first), torch.randn(5, 24), torch.randn(7, 24)
    padding = torch.arange(7) > 4
    check(layer, apart(layer), x, y, y, need_weights=need, key_padding_mask=padding, attn_mask=torch.eye(5, 7) > 0)
    fast = sparse(layer)
    assert off(fast(x, x, x)[0], layer(x, x, x)[0].detach()) <= 1e-5


def test_packed_for_oneself_it_is_dense_for_another(backend):
    layer, x, y = build(), torch.randn(5, 3, 24), torch.randn(7, 3, 24)
    fast = sparse(layer)
    assert sorted(fast._buffers) == ["packed_in", "packed_out"]
    assert not fast._takes(x, y, y, None, None, False)
    check(layer, fast, x, y, y)


def test_what_torch_refuses_is_refused(backend):
    layer, x = build(), torch.randn(5, 3, 24)
    fast = sparse(layer)
    for kwargs in (
        {"attn_mask": torch.zeros(1, 5)},
        {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(1, 5)},
        {"is_causal": True},
    ):
        with pytest.raises((RuntimeError, AssertionError), match=r".+") as plain:
            layer(x, x, x, **kwargs)
        with pytest.raises(type(plain.value), match=re.escape(str(plain.value))) as ours:
            fast(x, x, x, **kwargs)
        assert str(ours.value) == str(plain.value)
    for wrong in (torch.randn(5, 3, 23), torch.randn(24), torch.randn(1, 5, 3, 24)):
        with pytest.raises((RuntimeError, AssertionError), match=r".+"):
            fast(wrong, wrong, wrong)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_what_is_not_supported_stays_dense(options):
    (plan,) = candidates.survey(build(**options))
    assert plan.reason == "add_bias_kv and add_zero_attn are not supported"


def test_choices_go_by_tokens_of_the_query(backend):
    fast, x = apart(build()), torch.randn(5, 3, 24)
    assert fast.rows(x, x, x) == 15
    fast._choices = 1 << products.bucket(1)
    assert not fast._takes(x, x, x, None, None, False)
    assert list(itertools.islice(fast.watched(), 2)) == ["out", "in_proj_weight"]
