"""Counts that satisfy integer equations and come near to the wanted ones."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.structure.sizes import Equation, solve


def kept(units, wanted, equations, weights=None, **options):
    return solve(units, wanted, weights or [1.0] * len(units), equations, **options).kept.tolist()


def test_without_equations_each_count_is_the_wanted_one_rounded():
    assert kept([10, 7, 1], [4.4, 3.5, 0.2], []) == [4, 3, 1]


def test_embed_goes_in_steps_of_heads():
    """embed = 4 * head_dim: 22.4 is no multiple of 4, so the nearest is taken that is."""
    assert kept([32, 8], [22.4, 5.6], [Equation({0: 1, 1: -4}, "reshape")]) == [24, 6]


def test_the_heavier_cell_decides():
    equal = [Equation({0: 1, 1: -1}, "add")]
    assert kept([10, 10], [2, 8], equal, [100.0, 1.0]) == [2, 2]
    assert kept([10, 10], [2, 8], equal, [1.0, 100.0]) == [8, 8]


def test_steps_of_several_equations_combine():
    """embed = 4 a = 6 b: steps of 12."""
    equations = [Equation({0: 1, 1: -4}, "encoder"), Equation({0: 1, 2: -6}, "decoder")]
    assert kept([48, 12, 8], [30, 8, 5], equations) == [36, 9, 6]


def test_a_chain_of_layers_follows_one_count():
    layers = [Equation({0: 1, i: -4}, f"layer {i}") for i in range(1, 2000)]
    counts = kept([256] + [64] * 1999, [0.7 * 256] + [0.7 * 64] * 1999, layers)
    assert counts == [180] + [45] * 1999


def test_parts_that_are_unequal_but_add_up():
    """A concatenation of 20 + 12 cut into halves of 24 + 8."""
    counts = kept([20, 12, 24, 8], [14, 8.4, 16.8, 5.6], [Equation({0: 1, 1: 1, 2: -1, 3: -1}, "chunk")])
    assert sum(counts[:2]) == sum(counts[2:])
    assert np.abs(np.array(counts) - [14, 8.4, 16.8, 5.6]).max() < 1


def test_a_cell_that_must_equal_a_fixed_size_stays_whole_and_says_why():
    found = solve([8, 6], [4, 3], [1, 1], [Equation({0: 2}, "reshape in head (net.py:7)")])
    assert found.kept.tolist() == [8, 3]
    assert found.stuck == {0: "reshape in head (net.py:7)"}


def test_a_step_too_coarse_says_which_equations_made_it():
    found = solve([16, 2], [13, 1.8], [5, 1], [Equation({0: 1, 1: -8}, "view in attention")])
    assert found.kept.tolist() == [16, 2]
    assert found.stuck == {0: "view in attention"}


def test_counts_are_multiples_of_a_step_or_whole():
    assert kept([64, 20, 5], [30, 13, 2], [], step=8) == [32, 16, 5]
    assert kept([64, 16], [30, 8], [Equation({0: 1, 1: -4}, "heads")], step=8) == [32, 8]


def test_a_least_width_is_kept():
    assert kept([64, 20], [1, 1], [], least=4) == [4, 4]
    assert kept([64, 16], [1, 1], [Equation({0: 1, 1: -4}, "heads")], least=4) == [16, 4]


def test_what_is_wanted_beyond_what_there_is_keeps_all():
    assert kept([4, 4], [9, -3], []) == [4, 1]


@pytest.mark.parametrize("wanted", [[0, 0, 0], [5, 1, 9], [3, 3, 3]])
def test_the_same_question_has_the_same_answer(wanted):
    equations = [Equation({0: 1, 1: 1, 2: -1}, "cat")]
    assert kept([5, 4, 9], wanted, equations) == kept([5, 4, 9], wanted, equations)


PROBLEMS = st.integers(2, 4).flatmap(
    lambda cells: st.tuples(
        st.lists(st.integers(1, 8), min_size=cells, max_size=cells),
        st.lists(st.floats(1, 8), min_size=cells, max_size=cells),
        st.lists(st.floats(0.1, 5), min_size=cells, max_size=cells),
        st.lists(st.dictionaries(st.integers(0, cells - 1), st.integers(-4, 4), min_size=1), max_size=3),
        st.sampled_from([1, 2]),
    )
)


@given(PROBLEMS)
def test_every_equation_holds_and_every_count_is_allowed(problem):
    units, wanted, weights, coefficients, step = problem
    equations = [Equation(terms, "any") for terms in coefficients]
    found = solve(units, wanted, weights, equations, step=step)
    removed = np.array(units) - found.kept
    assert (found.kept >= 1).all()
    assert (removed >= 0).all()
    assert all(n == u or n % step == 0 for n, u in zip(found.kept.tolist(), units, strict=True))
    for terms in coefficients:
        assert sum(a * removed[c] for c, a in terms.items()) == 0
    assert set(found.stuck) <= set(np.flatnonzero(removed == 0).tolist())


@given(PROBLEMS)
def test_with_equations_between_two_counts_none_is_nearer(problem):
    units, wanted, weights, coefficients, step = problem
    pairs = [dict(sorted(terms.items())[:2]) for terms in coefficients]
    counts = np.array(kept(units, wanted, [Equation(terms, "any") for terms in pairs], weights, step=step))
    want = np.clip(wanted, 1, units)

    def cost(candidate):
        return float(np.array(weights) / units @ (np.array(candidate) - want) ** 2)

    def allowed(candidate):
        removed = np.array(units) - candidate
        even = all(r == 0 or n % step == 0 for n, r in zip(candidate, removed, strict=True))
        return even and all(sum(a * removed[c] for c, a in terms.items()) == 0 for terms in pairs)

    best = min(cost(c) for c in product(*(range(1, u + 1) for u in units)) if allowed(c))
    assert cost(counts) <= best * (1 + 1e-9) + 1e-9
