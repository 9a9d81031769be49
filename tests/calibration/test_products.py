"""Each function of torch that reads a weight is heard, and what it reads is summed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.anatomy import Layout
from secateur.calibration import products as products  # what a listener hears
from secateur.calibration.listening import Listener
from secateur.calibration.moments import Piece


@torch.no_grad()
def heard(call, weight, layout="oi"):
    """The moments of one weight that a function is called with."""
    holder = nn.Module()
    holder.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    members = sc.weights(holder, only=["weight"]).members
    object.__setattr__(members["weight"], "layout", Layout(layout))
    listener = Listener(members)
    with listener.forward():
        call(holder.weight)
    return listener.moments()


def exact(x):
    x = x.detach().double().reshape(-1, x.shape[-1])
    return x.T @ x


def same(moments, *inputs):
    """What was read by each group."""
    assert moments.count.tolist() == [x.numel() // x.shape[-1] for x in inputs]
    torch.testing.assert_close(moments.gram, torch.stack([exact(x) for x in inputs]), rtol=1e-5, atol=1e-5)


X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
FLAT = X.flatten(0, 1)
OI, IO = torch.randn(3, 6), torch.randn(6, 3)
CALLS = {
    "linear": (lambda w: F.linear(X, w), OI, "oi"),
    "linear, named": (lambda w: F.linear(weight=w, input=X), OI, "oi"),
    "linear, turned": (lambda w: F.linear(X, w.T), IO, "io"),
    "@": (lambda w: X @ w, IO, "io"),
    "@, turned": (lambda w: X @ w.T, OI, "oi"),
    "@, weight first": (lambda w: w @ X.mT, OI, "oi"),
    "@, a vector": (lambda w: FLAT[0] @ w, IO, "io"),
    "mv": (lambda w: torch.mv(w, FLAT[0]), OI, "oi"),
    "mm": (lambda w: torch.mm(FLAT, mat2=w), IO, "io"),
    "matmul": (lambda w: torch.matmul(w, other=FLAT.T), OI, "oi"),
    "addmm": (lambda w: torch.addmm(torch.zeros(3), FLAT, w, beta=0.5), IO, "io"),
    "addmm, a method": (lambda w: torch.zeros(3).addmm(FLAT, w), IO, "io"),
    "bmm, repeated": (lambda w: torch.bmm(X, w.expand(4, 6, 3)), IO, "io"),
    "einsum": (lambda w: torch.einsum("bti,oi->bto", X, w), OI, "oi"),
    "einsum, weight first": (lambda w: torch.einsum("io, ...i -> ...o", [w, X]), IO, "io"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_matrix_is_heard(name):
    call, weight, layout = CALLS[name]
    (moments,) = heard(call, weight, layout)
    same(moments, FLAT[:1] if name in ("@, a vector", "mv") else X)
    assert moments.pieces == (Piece("weight", 0, 3),)


STACK, TURNED = torch.randn(4, 3, 6), torch.randn(4, 6, 3)
STACKED = {
    "@": (lambda w: X @ w, TURNED, "gio"),
    "bmm, turned": (lambda w: torch.bmm(X, w.mT), STACK, "goi"),
    "baddbmm": (lambda w: torch.baddbmm(torch.zeros(4, 1, 3), X, w), TURNED, "gio"),
    "einsum": (lambda w: torch.einsum("eti,eoi->teo", X, w), STACK, "goi"),
    "weight first": (lambda w: w @ X.mT, STACK, "goi"),
    "one by one": (lambda w: [F.linear(x, one) for x, one in zip(X, w, strict=True)], STACK, "goi"),
    "two and two": (lambda w: [X[:2] @ w[:2], X[2:] @ w[2:]], TURNED, "gio"),
}


@pytest.mark.parametrize("name", STACKED)
def test_matrices_side_by_side_are_heard_each_with_its_own_input(name):
    (moments,) = heard(*STACKED[name])
    same(moments, *X)
    assert moments.pieces == (Piece("weight", 0, 12),)


def test_matrices_side_by_side_that_read_one_input():
    (moments,) = heard(lambda w: torch.einsum("ti,gio->gto", FLAT, w), TURNED, "gio")
    same(moments, *[FLAT] * 4)
    (moments,) = heard(lambda w: FLAT @ w, TURNED, "gio")
    same(moments, *[FLAT] * 4)


def test_einsum_with_several_dimensions_of_inputs_and_outputs():
    (moments,) = heard(lambda w: torch.einsum("bti,inh->btnh", X, w), torch.randn(6, 2, 4), "ioo")
    same(moments, X)
    y = torch.randn(3, 2, 5, 4)
    (moments,) = heard(lambda w: torch.einsum("bhtn,onh->bto", y, w), torch.randn(3, 4, 2), "oii")
    same(moments, y.permute(0, 2, 3, 1).reshape(3, 5, 8))


@pytest.mark.parametrize("equation", ["bti,oi->bo", "bti,ti->bti", "bti,ki->bt", "bti,oi", "bti,oi->bito"])
def test_einsums_that_are_no_products_of_matrices_are_not_heard(equation):
    weight = {"ti": torch.zeros(5, 6)}.get(equation.split(",")[1][:2], OI)
    assert heard(lambda w: torch.einsum(equation, X, w), weight) == []


@pytest.mark.parametrize("turned", [False, True])
def test_experts_hear_only_their_tokens(turned):
    weight = torch.randn(4, 8, 4) if turned else torch.randn(4, 4, 8)  # torch wants rows of 16 bytes or more
    tokens, ends = torch.randn(20, 8), torch.tensor([3, 3, 11, 20], dtype=torch.int32)
    inputs = tokens[:3], tokens[:0], tokens[3:11], tokens[11:]

    def grouped(w):
        return F.grouped_mm(tokens, w if turned else w.mT, offs=ends)

    chosen = torch.tensor([0] * 3 + [2] * 8 + [3] * 9)

    def copied(w):
        mine = w[chosen]
        return torch.bmm(tokens.unsqueeze(1), mine) if turned else torch.bmm(mine, tokens.unsqueeze(-1))

    for call in (grouped, copied):
        (moments,) = heard(call, weight, "gio" if turned else "goi")
        same(moments, *inputs)


def test_bilinear():
    a, b = torch.randn(7, 2), torch.randn(7, 3)
    layer = nn.Bilinear(2, 3, 4)
    (moments,) = heard(lambda w: F.bilinear(a, b, w), layer.weight, "oii")
    same(moments, (a[:, :, None] * b[:, None, :]).flatten(1))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@torch.no_grad()
def test_the_energy_of_a_convolution_is_that_of_its_output(kind):
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    member = sc.weights(layer).members["weight"]
    listener = Listener({"weight": member})
    with listener.forward():
        layer(x)
    (moments,) = listener.moments()
    matrix = moments.matrix({"weight": member.layout.outputs_first(layer.weight)}).double()
    energy = (matrix @ moments.gram * matrix).sum()
    torch.testing.assert_close(energy, layer(x).double().square().sum(), rtol=1e-5, atol=0)


ATTENTION = {
    "self": (nn.MultiheadAttention(6, 2), lambda x, y: (x, x, x)),
    "batch first": (nn.MultiheadAttention(6, 2, batch_first=True), lambda x, y: (x, x, x)),
    "cross": (nn.MultiheadAttention(6, 2, bias=False), lambda x, y: (x, y, y)),
    "apart": (nn.MultiheadAttention(6, 2, kdim=6, vdim=4), lambda x, y: (x, y, y[..., :4])),
    "biased": (nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True), lambda x, y: (x, y, x)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_of_torch(name, training):
    layer, given = ATTENTION[name]
    layer.train(training)
    inputs = given(X, X.flip(0) + 1)
    listener = Listener(sc.weights(layer).members)
    with listener.forward():
        out, shares = layer(*inputs)
    wanted, wanted_shares = layer(*inputs)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(shares, wanted_shares)
    found = listener.moments()
    for start, (x, one) in zip((0, 6, 12), zip(inputs, "qkv", strict=True), strict=True):
        whose = f"{one}_proj_weight" if name == "apart" else "in_proj_weight"
        at = 0 if name == "apart" else start
        (moments,) = (m for m in found for p in m.pieces if p.name == whose and p.start <= at < p.stop)
        same(moments, x)
    energy = out - layer.out_proj.bias if layer.out_proj.bias is not None else out
    last = found[-1]
    matrix = layer.out_proj.weight.double()
    assert last.names == ("out_proj.weight",)
    torch.testing.assert_close(
        (matrix @ last.gram[0] * matrix).sum(), energy.double().square().sum(), rtol=1e-4, atol=0
    )


def test_an_encoder_of_torch_is_heard_without_its_padding():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    real = torch.ones(4, 5, dtype=torch.bool)
    real[1, 2:] = False
    listener = Listener(sc.weights(model).members)
    with torch.no_grad(), listener.forward([real]):
        model(X, src_key_padding_mask=~real)
    found = listener.moments()
    assert len(found) == 8
    assert {one.count.item() for one in found} == {17}
    same(found[0], X[real])


def counts(model, call):
    """How many samples each weight read."""
    listener = Listener(sc.weights(model).members)
    with torch.no_grad(), listener.forward():
        call(model.eval())
    return {name: one.count.item() for one in listener.moments() for name in one.names}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", ["attention", "layer", "encoder"])
def test_padding_of_which_only_the_attention_is_told(kind, added, batch_first):
    real = torch.ones(4, 5, dtype=torch.bool)
    real[1, 2:] = False
    mask = torch.zeros(4, 5).masked_fill(~real, -torch.inf) if added else ~real
    x = X if batch_first else X.transpose(0, 1).contiguous()
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)
    inner = {
        "attention": nn.MultiheadAttention(6, 2, batch_first=batch_first),
        "layer": layer,
        "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    }[kind]
    model = nn.ModuleDict(
        {"before": nn.Linear(6, 6), "inner": inner, "after": nn.Linear(6, 3), "side": nn.Linear(6, 3)}
    )

    def call(model):
        x_in = model["before"](x)
        if kind == "attention":
            out = model["inner"](x_in, x_in, x_in, key_padding_mask=mask)[0]
        else:
            out = model["inner"](x_in, src_key_padding_mask=mask)
        model["after"](out)
        model["side"](out.reshape(-1, 2, 6))  # positions that the mask does not fit

    found = counts(model, call)
    assert (found.pop("before.weight"), found.pop("side.weight")) == (20, 20)
    assert set(found.values()) == {17}


def test_a_mask_of_keys_says_nothing_of_queries():
    real = torch.ones(4, 5, dtype=torch.bool)
    real[1, 2:] = False
    attention = nn.MultiheadAttention(6, 2, kdim=6, vdim=5, batch_first=True)  # three matrices
    model = nn.ModuleDict({"inner": attention, "after": nn.Linear(6, 3)})

    def call(model):
        model["after"](model["inner"](X + 1, X, X[..., :5], key_padding_mask=~real)[0])

    assert counts(model, call) == {
        "inner.q_proj_weight": 20,
        "inner.k_proj_weight": 17,
        "inner.v_proj_weight": 17,
        "inner.out_proj.weight": 20,
        "after.weight": 20,
    }


def test_a_decoder_has_padding_of_its_own():
    source, target = torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    source[1, 2:], target[0, 4:] = False, False
    model = nn.Transformer(6, 2, 1, 1, 8, batch_first=True)

    def call(model):
        model(X, X + 1, src_key_padding_mask=~source, tgt_key_padding_mask=~target, memory_key_padding_mask=~source)

    found = counts(model, call)
    assert {n for name, n in found.items() if name.startswith("encoder")} == {17}
    assert found["decoder.layers.0.linear1.weight"] == 19
    assert (
        counts(model, lambda model: model(X, X + 1, src_key_padding_mask=~source))["decoder.layers.0.linear1.weight"]
        == 20
    )


def test_one_input_that_is_read_before_and_after_its_mask_is_known():
    real = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    model = nn.ModuleDict(
        {"a": nn.Linear(6, 3), "inner": nn.MultiheadAttention(6, 2, batch_first=True), "b": nn.Linear(6, 3)}
    )

    def call(model):
        model["a"](X)
        model["inner"](X, X, X, key_padding_mask=~real)
        model["b"](X)

    found = counts(model, call)
    assert (found["a.weight"], found["b.weight"]) == (20, 14)
