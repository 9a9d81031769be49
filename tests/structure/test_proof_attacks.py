"""Wrong cuts made by hand: the proof finds each of them, also where the outputs hide it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import StructureError
from secateur.structure import rules
from secateur.structure.attributes import Edits, follow_forward, follow_modules
from secateur.structure.capture import capture
from secateur.structure.cut import cut, twin
from secateur.structure.groups import Groups, as_mask, scores
from secateur.structure.plan import as_plan
from secateur.structure.policy import Policy
from secateur.structure.proof import Proof
from secateur.structure.remains import Remains

assert rules


class Attention(nn.Module):
    """Rotary pairs, 4 heads of 8, a scale that is a number, and a branch behind a factor of almost zero."""

    def __init__(self, gain):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.q, self.k, self.v, self.o = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(32, 12)
        self.norm, self.last = nn.GroupNorm(4, 32), nn.Linear(12, 3)
        self.register_buffer("speed", 1 / 100 ** (torch.arange(4) / 4), persistent=False)
        self.gain = nn.Parameter(torch.full((12,), gain))
        self.heads = 4

    def turn(self, x):
        angle = torch.arange(x.shape[-2])[:, None] * self.speed
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x):
        x = self.first(x)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, scale=0.35)
        y = self.norm(y.transpose(1, 2).flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.last(x + self.gain * self.o(y))


def shrunk(gain, policy):
    torch.manual_seed(0)
    model, x = Attention(gain).eval(), torch.randn(2, 5, 6)
    small = twin(model)
    cap = capture(small, [((x,), {})], policy)
    groups = Groups(cap)
    kept, counts = groups.select(scores(groups, lambda name, w: w.square()), 0.5)
    plan, stays, edits = as_plan(small, groups, kept, counts, ()), as_mask(kept), Edits()
    cut(small, plan.kept)
    follow_modules(small, edits, policy.whole_heads)
    remains = Remains(cap.runs[0], stays)
    assert follow_forward(small, cap.runs[0], remains.sizes, edits)[1] == ""

    def prove():
        return Proof(model, [remains], groups.axes).difference(small)

    return small, plan, prove


@torch.no_grad()
def swap(t, a, b):
    t[[a, b]] = t[[b, a]]


def swapped_rows(small):
    swap(small.v.weight, 0, 1)


def torn_pairs(small):
    """Positions of a head change places in q and k alike: only the rotation is wrong."""
    for p in (small.q, small.k):
        swap(p.weight, 0, 1)
        swap(p.bias, 0, 1)


def unequal_q_and_k(small):
    swap(small.k.weight, 0, 2)
    swap(small.k.bias, 0, 2)


def wrong_normaliser(small):
    small.norm.num_groups = 1


def wrong_scale(small):
    small.k.weight.data.mul_(1.5)


def swapped_columns(small):
    swap(small.o.weight.T, 0, 3)


ATTACKS = [swapped_rows, torn_pairs, unequal_q_and_k, wrong_normaliser, wrong_scale, swapped_columns]
WAYS = [Policy(), Policy(whole_heads=False, cut_remade=True)]


@pytest.mark.parametrize("policy", WAYS)
@pytest.mark.parametrize("gain", [1.0, 1e-6, 0.0])
def test_the_right_cut_passes(gain, policy):
    _, plan, prove = shrunk(gain, policy)
    assert "q.weight" in plan.kept
    worst, call, _ = prove()
    assert worst < 1e-5
    assert call is None


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("policy", WAYS)
@pytest.mark.parametrize("gain", [1.0, 1e-6, 0.0])
def test_a_wrong_cut_is_found_also_behind_almost_zero(attack, gain, policy):
    small, _, prove = shrunk(gain, policy)
    attack(small)
    assert prove()[1] is not None


class Scaled(nn.Module):
    """What is read of a hidden width is a scale."""

    def __init__(self, zero=False):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(8, 32, bias=False),
            nn.Linear(32, 64, bias=False),
            nn.Linear(64, 4, bias=False),
        )
        if zero:
            nn.init.zeros_(self.b.weight)

    def forward(self, x):
        y = self.b(self.a(x))
        return self.c(y * (8 / self.a(x).shape[-1])) + self.c(y)


@pytest.mark.parametrize(
    ("model", "x", "sparsity"),
    [
        (Scaled(), torch.randn(4, 8), 0.5),
        (Scaled(zero=True), torch.randn(4, 8), 0.5),  # so low-rank layers begin
        (Scaled(), torch.zeros(4, 8), 0.5),
        (Scaled().bfloat16(), torch.randn(4, 8).bfloat16(), 0.04),  # that is 4 %, and 3 are rounding
    ],
)
def test_a_wrong_scale_is_found_though_zeros_or_rounding_hide_it(model, x, sparsity):
    with pytest.raises(
        StructureError, match=r"differs from the masked original by .* first after mul .* Change the code"
    ):
        sc.shrink(model, x, sparsity)


@pytest.mark.parametrize("bound", [torch.clamp, torch.clip, lambda x, a, b: nn.functional.hardtanh(x, a, b)])
def test_a_bound_that_is_a_size_is_found_though_no_number_reaches_it(bound):
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 4)

        def forward(self, x):
            a = self.a(x)
            return self.c(bound(self.b(a), -a.shape[-1], a.shape[-1]))

    with pytest.raises(StructureError, match=r"first after (clamp|clip|hardtanh) .* Change the code"):
        sc.shrink(Bounded(), torch.randn(4, 8), 0.5)
