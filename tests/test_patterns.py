"""secateur.patterns against brute force."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import patterns
from secateur.errors import InputError, InputTypeError, PatternError

LAYERS = {
    "Linear": lambda: nn.Linear(12, 5),
    "Conv1d": lambda: nn.Conv1d(12, 5, 3),
    "Conv2d": lambda: nn.Conv2d(12, 4, (3, 2)),
    "grouped": lambda: nn.Conv2d(24, 4, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(12, 5, 3),
    "LSTM": lambda: nn.LSTM(12, 24, num_layers=2),
    "MHA": lambda: nn.MultiheadAttention(12, 3),
}


def make(kind, ties=False):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape))
            if ties:
                weight.copy_((weight * 2).round())
    if kind == "Conv2d":
        layer.to(memory_format=torch.channels_last)
    return layer


def groups_of(shape, dim, m):
    """Index tuples of each full group of m neighbours along the input dimension."""
    others = [range(1) if d == dim else range(size) for d, size in enumerate(shape)]
    for place in itertools.product(*others):
        for start in range(0, shape[dim] // m * m, m):
            yield [(*place[:dim], start + i, *place[dim + 1 :]) for i in range(m)]


def brute_n_m(weight, dim, n, m):
    kept = torch.ones(weight.shape, dtype=torch.bool)
    for group in groups_of(weight.shape, dim, m):
        ranked = sorted(group, key=lambda index: float(weight[index].abs()))  # stable: of equals the later stay
        for index in ranked[: m - n]:
            kept[index] = False
    return kept


def dim_of(kind):
    return 0 if kind.startswith("ConvTranspose") else 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4), (2, 3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_n_m_by_brute_force(kind, n, m, ties):
    layer = make(kind, ties)
    want = {name: brute_n_m(w.detach(), dim_of(kind), n, m) for name, w in sc.weights(layer).items()}
    masks = sc.prune(layer, Fraction(m - n, m), pattern=sc.n_m(n, m))
    for name, mask in masks.items():
        assert torch.equal(mask, want[name]), name
    assert masks.sparsity == pytest.approx(1 - n / m)
    assert sc.check(layer, masks) == {}


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_the_tail_may_stay_dense(kind):
    layer = make(kind)
    want = brute_n_m(layer.weight.detach(), dim_of(kind), 2, 5)
    with pytest.raises(PatternError, match=r"weight of shape .* has 12 inputs, no multiple of 5.*tail='keep'"):
        sc.prune(layer, 0.6, pattern=sc.n_m(2, 5))
    assert layer.weight.all()
    masks = sc.prune(layer, 0.6, pattern=sc.n_m(2, 5, tail="keep"))
    assert torch.equal(masks["weight"], want)
    assert masks["weight"].movedim(dim_of(kind), 0)[10:].all()


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_tails_of_several_lengths(allocation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 8), nn.Linear(8, 3))
    want = {name: brute_n_m(w.detach(), 1, 2, 4) for name, w in sc.weights(model).items()}
    masks = sc.prune(model, 0.5, pattern=sc.n_m(2, 4, tail="keep"), allocation=allocation)
    same(masks, want)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_n_m_on_the_way_is_exact_and_never_grows_back(allocation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    pruner = sc.Pruner(model, 0.5, schedule=sc.cubic(0, 11), pattern=sc.n_m(2, 4), allocation=allocation)
    before, total = pruner.masks, 16 * 12 + 12 * 8
    for step in range(1, 12):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape) * 0.3)
        pruner.step()
        assert pruner.masks & before == pruner.masks
        assert pruner.masks.pruned == math.floor(0.5 * total * (1 - (1 - step / 11) ** 3) + 0.5)
        for _, mask in pruner.masks.items():
            assert mask.view(-1, 4).sum(1).min() >= 2
        before = pruner.masks
    for mask in pruner.finish().values():
        assert mask.view(-1, 4).sum(1).eq(2).all()


def test_n_m_on_the_way_takes_the_lowest_that_the_pattern_would_take():
    layer = make("Linear")
    final = brute_n_m(layer.weight.detach(), 1, 2, 4)
    plan_masks = sc.Pruner(layer, 0.5, schedule=sc.linear(0, 2), pattern=sc.n_m(2, 4))
    magnitudes = layer.weight.detach().abs().clone()
    plan_masks.step()
    mask = plan_masks.masks["weight"]
    assert int((~mask).sum()) == 15
    assert not (~mask & final).any()
    assert magnitudes[~mask].max() <= magnitudes[mask & ~final].min()


def test_n_m_needs_its_own_sparsity():
    with pytest.raises(InputError, match=r"always gives a sparsity of 0\.5, not 0\.9"):
        sc.prune(make("Linear"), 0.9, pattern=sc.n_m(2, 4))
    assert sc.prune(make("Linear"), 0.667, pattern=sc.n_m(1, 3)).pruned == 40


def test_protected_weights_count_for_n_m():
    layer = nn.Linear(4, 2, bias=False)
    score = torch.tensor([[math.inf, 1.0, 2.0, math.inf], [4.0, 3.0, 2.0, 1.0]])
    masks = sc.prune(layer, 0.5, pattern=sc.n_m(2, 4), score={"weight": score})
    assert masks["weight"].tolist() == [[True, False, False, True], [True, True, False, False]]
    score[0, 1] = math.inf
    with pytest.raises(InputError, match="protected"):
        sc.prune(layer, 0.5, pattern=sc.n_m(2, 4), score={"weight": score})


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_bad_n_m(n, m):
    with pytest.raises(InputError, match="0 < n < m"):
        sc.n_m(n, m)


@pytest.mark.parametrize("bad", [lambda: sc.n_m(2, 4, tail="drop"), lambda: sc.blocks(2, 2, tail="")])
def test_bad_tail(bad):
    with pytest.raises(InputError, match="choose 'error' or 'keep'"):
        bad()


def test_bad_blocks_and_lines():
    for sides in ((0, 1), (1, 0), (-2, 2)):
        with pytest.raises(InputError, match="at least 1"):
            sc.blocks(*sides)


@pytest.mark.parametrize("along", [2, -1])
def test_lines_lie_along_the_first_or_the_second_dimension(along):
    layer = make("Linear")
    with pytest.raises(InputError, match=r"choose 0 for rows \(outputs\) or 1 for columns"):
        sc.prune(layer, 0.5, pattern=patterns.lines(along))


def nearest_whole(groups, count):
    """Take groups (score, weights), the lowest first, to the nearest count, half up; return how many."""
    taken = total = 0
    for weights in groups:
        if abs(total + weights - count) > abs(total - count):
            break
        taken, total = taken + 1, total + weights
    return taken


ALL = sc.allocation.global_(allow_empty=True)  # without the guard, which brute force does not know


def same(masks, want):
    assert masks.counts() == {name: int((~mask).sum()) for name, mask in want.items()}
    assert all(torch.equal(masks[name], mask) for name, mask in want.items())


@pytest.mark.filterwarnings("ignore:.*keeps under 1 %")
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 1), (1, 4), (4, 4)])
def test_blocks_by_brute_force(height, width, sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv2d(4, 8, 2))
    found = []
    for name, weight in sc.weights(model).items():
        w = weight.detach().abs()
        for i, j in itertools.product(range(0, w.shape[0], height), range(0, w.shape[1], width)):
            for rest in itertools.product(*map(range, w.shape[2:])):
                place = (slice(i, i + height), slice(j, j + width), *rest)
                found.append((float(w[place].mean()), name, place))
    found.sort(key=lambda entry: entry[0])
    count = math.floor(sparsity * 224 + 0.5)
    want = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in sc.weights(model).items()}
    for _, name, place in found[: nearest_whole([height * width] * len(found), count)]:
        want[name][place] = False
    same(sc.prune(model, sparsity, pattern=sc.blocks(height, width), allocation=ALL), want)


def test_blocks_keep_their_tails_or_refuse():
    layer = nn.Linear(7, 5)
    with pytest.raises(PatternError, match=r"weight of shape \(5, 7\) is not divisible into blocks of 2 x 3.*keep"):
        sc.prune(layer, 0.5, pattern=sc.blocks(2, 3))
    mask = sc.prune(layer, 0.6, pattern=sc.blocks(2, 3, tail="keep"))["weight"]
    assert mask[4].all()
    assert mask[:, 6].all()
    tiles = mask[:4, :6].reshape(2, 2, 2, 3).transpose(1, 2).flatten(2)
    assert (tiles.all(-1) | ~tiles.any(-1)).all()
    assert int((~mask).sum()) == 24  # 21 were asked: 18 and 24 are as near, and halves go up


def test_a_tensor_smaller_than_a_block_stays():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    masks = sc.prune(model, 0.4, pattern=sc.blocks(4, 4, tail="keep"))
    assert masks["1.weight"].all()
    assert masks.counts()["0.weight"] == 32


@pytest.mark.filterwarnings("ignore:.*keeps under 1 %")
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_lines_of_several_lengths_hit_the_nearest_count(kind, sparsity):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 7), nn.Conv1d(5, 4, 2))
    along = 0 if kind == "rows" else 1
    found = []
    for name, weight in sc.weights(model).items():
        lines = weight.detach().abs().movedim(along, 0).flatten(1)
        found += [(float(line.mean()), name, i, line.numel()) for i, line in enumerate(lines)]
    found.sort(key=lambda entry: entry[0])
    total = 30 + 70 + 40
    taken = nearest_whole([size for *_, size in found], math.floor(sparsity * total + 0.5))
    want = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in sc.weights(model).items()}
    for _, name, i, _ in found[:taken]:
        want[name].movedim(along, 0)[i] = False
    same(sc.prune(model, sparsity, pattern=kind, allocation=ALL), want)


@pytest.mark.parametrize("kind", ["rows", "columns", sc.blocks(2, 2)], ids=str)
def test_gradually_whole_groups_stay_pruned(kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 6), pattern=kind)
    before = pruner.masks
    for _ in range(6):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape) * 0.3)
        pruner.step()
        assert pruner.masks & before == pruner.masks
        before = pruner.masks
    assert abs(pruner.finish().pruned - 50) <= 5


def test_a_pruner_tells_the_sparsity_that_is_there():
    """With a pattern the count is met to the nearest group: `Pruner.sparsity` is what is pruned, not what was asked."""
    pruner = sc.Pruner(nn.Linear(10, 3), 0.5, pattern="rows")
    pruner.step()
    assert pruner.sparsity == pruner.masks.sparsity


@pytest.mark.parametrize("chosen", ["rows", "columns", sc.n_m(2, 4), sc.blocks(2, 2)], ids=str)
def test_a_pattern_on_a_bias(chosen):
    model = nn.Linear(4, 4)
    sparsity = 0.5
    with pytest.raises(PatternError, match=r"bias of shape .*leave it out of the scope"):
        sc.prune(model, sparsity, pattern=chosen, scope=sc.weights(model, only=["bias"]))


@pytest.mark.parametrize("chosen", ["rows", sc.blocks(2, 2), sc.n_m(2, 4)], ids=str)
def test_padding_rows_stay(chosen):
    torch.manual_seed(0)
    model = nn.Embedding(6, 8, padding_idx=0)
    masks = sc.prune(model, 0.5, pattern=chosen, scope=sc.weights(model, only=nn.Embedding))
    assert masks["weight"][0].all()
    assert masks.pruned in (16, 20, 24)


def test_resolve_names_the_choices():
    with pytest.raises(InputError, match=r"no pattern named '2/4': choose free, 2:4, 4x4, rows, columns, or an object"):
        sc.prune(make("Linear"), 0.5, pattern="2/4")
    with pytest.raises(InputTypeError, match="pattern is a tuple"):
        sc.prune(make("Linear"), 0.5, pattern=(2, 4))
    assert sc.prune(make("Linear"), 0.5, pattern="free") == sc.prune(make("Linear"), 0.5)
