"""secateur.allocation: integers that add up exactly, against hand computations."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur import allocation
from secateur.allocation import apportion
from secateur.errors import InputError, InputTypeError
from secateur.sparsity import fraction, half_up

sizes = st.lists(st.integers(0, 10**7), min_size=1, max_size=12)


def net(*shapes, seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    for i, (rows, columns) in enumerate(shapes):
        model.add_module(f"l{i}", nn.Linear(columns, rows, bias=False))
    return model


def pruned(masks):
    return list(masks.counts().values())


# apportion


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_apportion(data):
    want = data.draw(sizes)
    most = data.draw(st.lists(st.integers(0, 10**7), min_size=len(want), max_size=len(want)))
    count = data.draw(st.integers(0, sum(most)))
    names = [f"t{i}" for i in range(len(want))]
    got = apportion(dict(zip(names, want, strict=True)), dict(zip(names, most, strict=True)), count)
    assert list(got) == names
    assert sum(got.values()) == count
    assert all(0 <= got[name] <= m for name, m in zip(names, most, strict=True))


@given(sizes.filter(any), st.data())
@settings(deadline=None, max_examples=200)
def test_apportion_is_largest_remainder(want, data):
    count = data.draw(st.integers(0, sum(want)))
    names = [f"t{i}" for i in range(len(want))]
    table = dict(zip(names, want, strict=True))
    got = apportion(table, table, count)
    quota = [Fraction(count * w, sum(want)) for w in want]
    floors = [math.floor(q) for q in quota]
    order = sorted(range(len(want)), key=lambda i: (floors[i] - quota[i], i))
    up = set(order[: count - sum(floors)])
    assert [got[n] for n in names] == [f + (i in up) for i, f in enumerate(floors)]


def test_apportion_shares_again_what_one_cannot_take():
    assert apportion({"a": 10, "b": 10, "c": 20}, {"a": 1, "b": 100, "c": 100}, 31) == {"a": 1, "b": 10, "c": 20}
    assert apportion({"a": 0, "b": 0}, {"a": 5, "b": 5}, 3) == {"a": 2, "b": 1}
    assert apportion({}, {}, 0) == {}


# the guard


@pytest.mark.parametrize("bad", [-1, True, 1.5, -0.1, math.nan, math.inf])
def test_min_keep_is_checked(bad):
    with pytest.raises(InputError, match="min_keep="):
        allocation.global_(min_keep=bad)


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_min_keep_zero_must_be_said_twice(nothing):
    with pytest.raises(InputError, match="allow_empty=True"):
        allocation.uniform(min_keep=nothing)
    assert allocation.uniform(min_keep=nothing, allow_empty=True).most(7) == 7


def test_most_of_an_int():
    assert [allocation.global_(min_keep=3).most(free) for free in (0, 2, 3, 4, 100)] == [0, 0, 0, 1, 97]


@pytest.mark.parametrize("hundredths", [1, 7, 14, 28, 29, 50, 55, 57, 100])
def test_most_of_a_fraction_is_exact(hundredths):
    chosen = allocation.global_(min_keep=hundredths / 100)
    for free in range(1001):
        least = -(-hundredths * free // 100)  # at least that fraction stays, and not one weight more
        assert chosen.most(free) == free - least, free


@pytest.mark.filterwarnings("ignore:.*keeps under 1 %")
@pytest.mark.filterwarnings("ignore:the masks keep .* whose value is zero")
@pytest.mark.parametrize("kind", ["global_", "uniform", "erk", "lamp"])
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_every_allocation_is_exact_and_keeps_the_least(kind, data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5))
    model = net(*shapes, seed=data.draw(st.integers(0, 9)))
    for weight in model.parameters():
        weight.data = (weight.data * 8).round()  # ties and zeros
    keep = data.draw(st.one_of(st.integers(1, 4), st.sampled_from([0.05, 0.25, 0.5])))
    chosen = getattr(allocation, kind)(min_keep=keep)
    numels = [r * c for r, c in shapes]
    least = [min(n, keep if isinstance(keep, int) else math.ceil(Fraction(str(keep)) * n)) for n in numels]
    count = data.draw(st.integers(0, sum(numels) - sum(least)))
    masks = sc.prune(model, sc.Count(count), allocation=chosen)
    assert masks.pruned == count
    assert all(n - p >= k for n, p, k in zip(numels, pruned(masks), least, strict=True))


def test_the_guard_takes_from_the_others_exactly():
    model = net((2, 2), (10, 10))
    model.l0.weight.data.fill_(1e-6)
    model.l1.weight.data = torch.arange(1.0, 101.0).view(10, 10)
    masks = sc.prune(model, sc.Count(50))
    assert pruned(masks) == [3, 47]
    assert masks["l1.weight"].flatten().nonzero().flatten().tolist() == list(range(47, 100))
    assert masks["l0.weight"].flatten().tolist() == [False, False, False, True]


def test_a_budget_that_cannot_be_met():
    model = net((2, 2), (3, 3))
    with pytest.raises(
        InputError,
        match=r"12 weights cannot be pruned: each tensor keeps at least 1, so that at most 11 can.*allow_empty=True",
    ):
        sc.prune(model, sc.Count(12))
    with pytest.raises(InputError, match=r"keeps at least 0.5"):
        sc.prune(model, 0.6, allocation=allocation.erk(min_keep=0.5))
    assert sc.prune(model, 1.0, allocation=allocation.global_(allow_empty=True)).pruned == 13


def test_allow_empty_is_quiet_about_what_was_insisted_on():
    model = net((20, 10), (20, 10))
    model.l0.weight.data.fill_(1e-6)
    masks = sc.prune(model, sc.Count(200), allocation=allocation.global_(allow_empty=True))
    assert pruned(masks) == [200, 0]


# the shares


def test_global_ranks_all_together():
    model = net((4, 4), (5, 3))
    want = torch.cat([p.detach().abs().flatten() for p in model.parameters()]).sort().values[11]
    masks = sc.prune(model, sc.Count(12))
    counts = [int((model_weight.abs() <= want).sum()) for model_weight in net((4, 4), (5, 3)).parameters()]
    assert pruned(masks) == counts


def test_uniform_is_the_same_fraction():
    assert pruned(sc.prune(net((10, 10), (20, 5), (4, 5)), 0.3, allocation="uniform")) == [30, 30, 6]
    assert pruned(sc.prune(net(*[(1, 3)] * 100), 0.1, allocation="uniform")) == [1] * 30 + [0] * 70


def test_uniform_counts_no_padding():
    model = nn.ModuleDict({"words": nn.Embedding(4, 30, padding_idx=0), "head": nn.Linear(30, 3)})
    scope = sc.weights(model, only=[nn.Embedding, nn.Linear])
    assert pruned(sc.prune(model, 0.5, allocation="uniform", scope=scope)) == [45, 45]


def exact_erk(shapes, keep):
    """RigL, section 3: a layer keeps eps (sum of its dimensions), at most all; eps makes the total right."""
    numel = [math.prod(shape) for shape in shapes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        eps = Fraction(keep - sum(numel[i] for i in full), sum(sum(shapes[i]) for i in rest))
        over = {i for i in rest if eps * sum(shapes[i]) > numel[i]}
        if not over:
            return [Fraction(numel[i]) if i in full else eps * sum(shapes[i]) for i in range(len(shapes))]
        full |= over


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "shapes", [[(20, 10), (10, 20), (100, 100)], [(3, 2), (64, 64), (64, 32)], [(5, 5)], [(7, 9), (9, 7), (1, 100)]]
)
def test_erk_by_hand(shapes, sparsity):
    numel = sum(r * c for r, c in shapes)
    keep = numel - half_up(fraction(sparsity) * numel)
    masks = sc.prune(net(*shapes), sparsity, allocation="erk")
    kept = [r * c - p for (r, c), p in zip(shapes, pruned(masks), strict=True)]
    assert sum(kept) == keep
    assert all(abs(k - want) < 1 for k, want in zip(kept, exact_erk(shapes, keep), strict=True))


def test_erk_counts_the_kernel():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.Conv2d(16, 32, 1, bias=False))
    kept = [1152 - 922, 512 - 409]  # 333 of 1664 kept, as (16+8+3+3) : (32+16+1+1)
    masks = sc.prune(model, 0.8, allocation="erk")
    kept = [mask.sum().item() for mask in masks.values()]
    assert sum(kept) == 1664 - 1331
    assert kept == [125, 208]


def brute_lamp(weights, count):
    """LAMP, eq. 1, weight by weight, then one ranking of all."""
    ranked = []
    for name, weight in weights.items():
        order = sorted((float(w) ** 2, i) for i, w in enumerate(weight.flatten().double()))
        for place, (square, _) in enumerate(order):
            rest = math.fsum(s for s, _ in order[place:])
            ranked.append((square / rest if rest else 0.0, name))
    ranked.sort(key=lambda entry: entry[0])
    lost = [name for _, name in ranked[:count]]
    return {name: lost.count(name) for name in weights}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_lamp_by_hand(sparsity, seed):
    model = net((9, 9), (20, 4), (3, 30), seed=seed)
    with torch.no_grad():
        model.l1.weight.mul_(50)
        model.l2.weight.mul_(0.001)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = half_up(fraction(sparsity) * 251)
    masks = sc.prune(model, sparsity, allocation="lamp")
    assert masks.counts() == brute_lamp(weights, count)
    for name, mask in masks.items():
        magnitudes = weights[name].abs()
        assert magnitudes[~mask].max() < magnitudes[mask].min()


def test_lamp_does_not_care_for_the_scale_of_a_tensor():
    one, other = net((9, 9), (8, 8)), net((9, 9), (8, 8))
    other.l0.weight.data.mul_(1024)
    assert sc.prune(one, 0.7, allocation="lamp") == sc.prune(other, 0.7, allocation="lamp")


def test_lamp_never_takes_the_last_of_a_tensor():
    """The largest weight of each tensor scores 1."""
    masks = sc.prune(net((2, 2), (3, 3), (40, 40)), sc.Count(1610), allocation=allocation.lamp(allow_empty=True))
    assert pruned(masks) == [3, 8, 1599]


# a user's own


def test_a_function_shares():
    seen = {}

    def first_only(weights, count):
        seen.update({name: tuple(w.shape) for name, w in weights.items()}, count=count)
        return {"l0.weight": count, "l1.weight": 0}

    masks = sc.prune(net((6, 6), (5, 5)), sc.Count(20), allocation=first_only)
    assert pruned(masks) == [20, 0]
    assert seen == {"l0.weight": (6, 6), "l1.weight": (5, 5), "count": 20}


def test_a_function_that_asks_too_much_of_one_is_guarded():
    masks = sc.prune(net((3, 3), (5, 5)), sc.Count(20), allocation=lambda w, n: {"l0.weight": n, "l1.weight": 0})
    assert pruned(masks) == [8, 12]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (lambda w, n: {"l0.weight": n}, "for each tensor"),
        (lambda w, n: {"l0.weight": n, "l1.weight": 0, "x": 0}, "for each tensor"),
        (lambda w, n: {"l0.weight": n / 2, "l1.weight": n / 2}, "how many weights"),
        (lambda w, n: {"l0.weight": n + 1, "l1.weight": -1}, "how many weights"),
        (lambda w, n: {"l0.weight": n, "l1.weight": 1}, "add up to 21, not to the 20"),
    ],
)
def test_a_function_that_gives_no_counts(share, message):
    model = net((6, 6), (5, 5))
    before = model.l0.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        sc.prune(model, sc.Count(20), allocation=share)
    assert torch.equal(model.l0.weight, before)


def test_resolve_names_the_choices():
    with pytest.raises(InputError, match="no allocation named 'layer': choose global, uniform, erk, lamp"):
        sc.prune(net((3, 3)), 0.5, allocation="layer")
    with pytest.raises(InputTypeError, match=r"in place of the sparsity: sc\.prune\(model, \{"):
        sc.prune(net((3, 3)), 0.5, allocation={"l0.weight": 0.5})


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_shared_stays_within_least_and_most(data):
    """On the way, what is pruned stays pruned, none loses more than it may, and the total is exact."""
    numel = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
    weights = {f"t{i}": torch.empty(n) for i, n in enumerate(numel)}
    bounds = {}
    for name, w in weights.items():
        most = data.draw(st.integers(0, w.numel()))
        bounds[name] = data.draw(st.integers(0, most)), most
    count = data.draw(st.integers(sum(lo for lo, _ in bounds.values()), sum(hi for _, hi in bounds.values())))
    for chosen in (allocation.uniform(), allocation.erk()):
        got = allocation.shared(chosen, weights, bounds, count)
        assert sum(got.values()) == count
        assert all(lo <= got[name] <= hi for name, (lo, hi) in bounds.items())
