"""Which weights stay: exact counts, against brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.calibration.moments import Moments, Piece
from secateur.calibration.supports import selector
from secateur.errors import InputError, PatternError
from secateur.patterns import blocks, columns, n_m, rows


def moments(inputs, groups=1, *pieces):
    return Moments(pieces or (Piece("w", 0, 1 << 20),), torch.zeros(groups, inputs, inputs), torch.ones(groups))


def drawn(shape, seed, levels):
    """Scores with many ties, and weights of which a part is zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, shape, generator=generator).float()
    return scores, torch.randint(4, shape, generator=generator).float()


def brute(scores, weights, zeros, units):
    """Level by level: each unit may have one more, those with the highest scores first."""
    alive = (weights != 0).view(units, -1)
    ranks = scores.reshape(units, -1).masked_fill(~alive, -math.inf).tolist()
    orders = [sorted(range(len(own)), key=lambda i: (own[i], i), reverse=True) for own in ranks]
    has = alive.sum(1).tolist()
    kept, left = torch.zeros_like(alive), min(scores.numel() - zeros, int(alive.sum()))
    for place in range(max(has)):
        able = [u for u in range(units) if place < has[u]]
        able.sort(key=lambda u: (ranks[u][orders[u][place]], u), reverse=True)
        for u in able[:left]:
            kept[u, orders[u][place]] = True
        left -= min(left, len(able))
    return kept.view(scores.shape)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    within=st.sampled_from(["matrix", "row"]),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([1, 3, 1000]),
    share=st.floats(0, 1),
)
def test_counts_are_exact_and_the_choice_is_that_of_brute_force(shape, within, seed, levels, share):
    scores, weights = drawn(shape, seed, levels)
    zeros = round(share * weights.numel())
    kept = selector(moments(shape[2], shape[0]), {"w": shape}, weights, zeros, within=within)(scores)
    there = int((weights == 0).sum())
    assert int((~kept).sum()) == max(zeros, there)
    assert not kept[weights == 0].any()
    count = {"matrix": 1, "row": shape[0] * shape[1]}[within]
    assert kept.equal(brute(scores, weights, zeros, count))


@pytest.mark.slow
def test_a_wide_matrix_goes_the_same_way():
    scores, weights = drawn((1, 300, 700), 0, 50)
    kept = selector(moments(700), {}, weights, 170_000)(scores)
    assert kept.equal(brute(scores, weights, 170_000, 1))


@given(seed=st.integers(0, 1000), m=st.sampled_from([2, 4, 8]), levels=st.sampled_from([2, 1000]))
def test_each_group_of_m_inputs_has_the_n_highest(seed, m, levels):
    scores, weights = drawn((2, 3, 16), seed, levels)
    weights[weights == 0] = 1
    kept = selector(moments(16, 2, Piece("w", 0, 6)), {"w": (6, 16)}, weights, 96 - 96 // m, pattern=n_m(1, m))(scores)
    found, grouped = kept.view(-1, m), scores.view(-1, m)
    assert found.sum(1).eq(1).all()
    assert grouped[found].equal(grouped.max(1).values)


def test_kernels_and_pieces_are_laid_as_their_tensors_are():
    shapes = {"a": (4, 4, 3), "b": (8, 8)}
    pieces = Piece("a", 0, 4), Piece("b", 4, 8)
    scores, _ = drawn((1, 4, 20), 0, 1000)
    kept = selector(moments(20, 1, *pieces), shapes, torch.ones(1, 4, 20), 40, pattern=n_m(2, 4))(scores)
    assert kept[0, :, :12].unflatten(1, (4, 3)).sum(1).eq(2).all()
    assert kept[0, :, 12:].unflatten(1, (2, 4)).sum(2).eq(2).all()


def test_zeros_that_are_there_count_in_a_group_of_n_of_m():
    weights = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]])
    kept = selector(moments(4), {"w": (1, 4)}, weights, 2, pattern=n_m(2, 4))(torch.tensor([[[1.0, 9.0, 3.0, 2.0]]]))
    assert kept.tolist() == [[[False, False, True, True]]]


@pytest.mark.parametrize(("pattern", "size"), [(blocks(2, 4), 8), (rows, 8), (columns, 6)])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.9, 1])
def test_whole_groups_go_to_the_nearest_count(pattern, size, share):
    scores, _ = drawn((1, 6, 8), 1, 1000)
    kept = selector(moments(8), {"w": (6, 8)}, torch.ones(1, 6, 8), round(48 * share), pattern=pattern)(scores)
    gone = int((~kept).sum())
    assert gone == size * math.floor(round(48 * share) / size + 0.5)
    lowest = pattern.reduce(scores[0], gone).reshape(-1).sort().values[: gone // size]
    assert pattern.reduce(scores[0].masked_fill(kept[0], 0.0), gone).sum() == pytest.approx(float(lowest.sum()))


def test_zeros_within_a_block_stay_and_blocks_of_zeros_go_first():
    weights = torch.ones(1, 2, 8)
    weights[0, :, 4:6] = 0
    weights[0, 0, 0] = 0
    scores = torch.ones(1, 2, 8)
    scores[0, :, 4:6] = 100
    kept = selector(moments(8), {"w": (2, 8)}, weights, 4, pattern=blocks(2, 2))(scores)
    assert kept.equal(weights != 0)


def test_what_is_decided_stays_decided():
    scores, _ = drawn((1, 4, 8), 2, 1000)
    for pattern, zeros in ((None, 20), (n_m(2, 4), 16), (blocks(2, 2), 20), (rows, 16)):
        select = selector(moments(8), {"w": (4, 8)}, torch.ones(1, 4, 8), zeros, pattern=pattern)
        decided = scores.clone()
        decided[..., :3] = torch.where(select(scores)[..., :3], math.inf, -math.inf)
        assert select(decided).equal(select(scores))


def test_tails_that_stay():
    select = selector(moments(6), {"w": (2, 6)}, torch.ones(1, 2, 6), 4, pattern=n_m(2, 4, tail="keep"))
    assert select(torch.rand(1, 2, 6)).sum(-1).eq(4).all()
    select = selector(moments(5), {"w": (3, 5)}, torch.ones(1, 3, 5), 8, pattern=blocks(2, 2, tail="keep"))
    assert int(select(torch.rand(1, 3, 5)).sum()) == 7


def test_budgets_that_cannot_be_met_are_refused():
    weights = torch.ones(1, 2, 8)
    with pytest.raises(InputError, match="17 zeros were asked of w, of 16"):
        selector(moments(8), {"w": (2, 8)}, weights, 17)
    with pytest.raises(PatternError, match="8 at most: ask for fewer"):
        selector(moments(8), {"w": (2, 8)}, weights, 9, pattern=n_m(2, 4))
    with pytest.raises(PatternError, match="multiple of 3"):
        selector(moments(8), {"w": (2, 8)}, weights, 4, pattern=n_m(1, 3))
