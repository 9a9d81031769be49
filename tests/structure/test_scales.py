import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.structure import Plan, propose, shrink

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """The size of a head is read as a scale while the forward runs."""

    def __init__(self, product, fused=False, norm=None, heads=1):
        super().__init__()
        self.product, self.fused, self.heads = product, fused, heads
        self.first, self.out, self.last = nn.Linear(6, 20), nn.Linear(24, 20), nn.Linear(20, 3)
        if fused:
            self.qkv = nn.Linear(20, 72)
        else:
            self.q, self.k, self.v = nn.Linear(20, 24), nn.Linear(20, 24, bias=False), nn.Linear(20, 24)
        self.q_norm, self.k_norm = (norm(24 // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = self.product(self.q_norm(q), self.k_norm(k), v)
        return self.last(F.relu(x + self.out(y.transpose(1, 2).flatten(2))))


def divided(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def multiplied(q, k, v):
    return (q * k.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def both_multiplied(q, k, v):
    return (q * q.shape[-1] ** -0.25 @ (k * k.shape[-1] ** -0.25).transpose(-2, -1)).softmax(-1) @ v


PRODUCTS = [F.scaled_dot_product_attention, divided, multiplied, both_multiplied]


def made(*args, **kwargs):
    torch.manual_seed(0)
    return Attention(*args, **kwargs).eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_scale_is_folded_into_the_query(product, fused):
    model = made(product, fused)
    plan = propose(model, X, 0.5)
    names = {one.name for one in plan.scaled}
    assert {"qkv.weight", "qkv.bias"} <= names if fused else {"q.weight", "q.bias"} <= names
    small = shrink(model, X, 0.5)
    assert small.out.in_features == 12
    assert plan.scaled[0].factor == pytest.approx(0.5**0.25 if product is both_multiplied else 0.5**0.5, rel=1e-4)
    if fused:
        assert plan.scaled[0].positions == tuple(range(12))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_behind_a_norm_its_weight_is_what_can_be_multiplied(norm):
    plan = propose(made(F.scaled_dot_product_attention, norm=norm), X, 0.5)
    assert {one.name for one in plan.scaled} >= {"q_norm.weight"}
    assert not any(one.name.startswith("q.") for one in plan.scaled)


def test_where_little_is_lost_what_would_be_multiplied_stays():
    model = made(F.scaled_dot_product_attention)
    model.last = nn.Sequential(nn.Linear(20, 600), nn.ReLU(), nn.Linear(600, 3))
    plan = propose(model, X, 0.5)
    assert plan.scaled == ()
    assert "the size of a head is read as a scale" in {group.held for group in plan.groups}


def test_a_shared_norm_is_in_the_way():
    model = made(F.scaled_dot_product_attention, norm=nn.LayerNorm)
    model.k_norm = model.q_norm
    small = shrink(model, X, 0.5)
    assert small.q.out_features == small.k.out_features == 24
    assert small.v.out_features == small.out.in_features == 12


def test_multi_head_attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.m, self.c = nn.Linear(6, 24), nn.MultiheadAttention(24, 1, batch_first=True), nn.Linear(24, 3)

        def forward(self, x):
            x = self.a(x)
            return self.c(F.relu(x + self.m(x, x, x, need_weights=False)[0]))

    torch.manual_seed(0)
    plan = propose(Model().eval(), X, 0.5)
    assert [one.name for one in plan.scaled] == ["m.in_proj_weight", "m.in_proj_bias"]
    assert plan.scaled[0].positions == tuple(range(12))


def test_a_plan_carries_what_is_multiplied():
    model = made(divided)
    plan, other = Plan.from_json(propose(model, X, 0.5).to_json()), made(divided)
    small, state = shrink(model, X, 0.5), plan.apply_state_dict(copy.deepcopy(other.state_dict()))
    plan.apply(other)
    assert torch.equal(other(X), small(X))
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())


def test_whole_heads_need_no_factor():
    assert propose(made(divided, heads=4), X, 0.5).scaled == ()


class ByWidth(nn.Linear):
    """Divides its weight by the root of its width, as it is now."""

    def forward(self, x):
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


def test_a_weight_that_is_divided_by_the_root_of_its_width_is_scaled():
    torch.manual_seed(0)
    model = nn.Sequential(ByWidth(6, 24), nn.ReLU(), ByWidth(24, 16), nn.ReLU(), ByWidth(16, 3))
    plan = propose(model, X, 0.5)
    assert [(one.name, round(one.factor**2, 6)) for one in plan.scaled] == [("2.weight", 0.5), ("4.weight", 0.5)]
    small = shrink(model, X, plan=plan)
    with torch.no_grad():
        for name in ("0", "2"):
            gone = torch.ones(len(model.get_parameter(f"{name}.weight")))
            gone[plan.kept[f"{name}.weight"][0]] = 0
            model.get_parameter(f"{name}.weight")[gone.bool()] = 0
            model.get_parameter(f"{name}.bias")[gone.bool()] = 0
    torch.testing.assert_close(small(X), model(X))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_scale_that_one_token_or_small_weights_hide_is_folded(tokens):
    """A softmax over one key is 1 whatever the scale; over logits near zero it hardly changes."""
    torch.manual_seed(0)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)).eval()
    if tokens > 1:
        with torch.no_grad():
            model.q.weight.mul_(1e-4)
            model.q.bias.mul_(1e-4)
    plan = propose(model, X[:, :tokens], 0.5)
    assert {one.name: round(one.factor**2, 6) for one in plan.scaled} == {"q.weight": 0.5, "q.bias": 0.5}


class Elsewhere(nn.Module):
    """A scale is the size of a tensor that the call does not read."""

    def __init__(self):
        super().__init__()
        self.size, self.first, self.q, self.k = 24, nn.Linear(6, 24), nn.Linear(24, 8), nn.Linear(24, 8)
        self.inner, self.outer = nn.Linear(5, 400), nn.Linear(400, 3)

    def forward(self, x):
        x = self.first(x).view(*x.shape[:2], self.size)
        y = torch.baddbmm(x.new_zeros(1, 1, 1), self.q(x), self.k(x).mT, alpha=self.size**-0.5)
        return self.outer(self.inner(y).relu())


def test_a_scale_that_is_the_size_of_another_tensor_holds_that():
    torch.manual_seed(0)
    small = shrink(Elsewhere(), X, 0.5)
    assert (small.size, small.inner.out_features) == (24, 200)
