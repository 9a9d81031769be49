"""secateur.sparsity: amounts read exactly as they are written."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, UnknownNameError
from secateur.sparsity import explicit, fraction, half_up


def net(*shapes, seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    for i, (rows, columns) in enumerate(shapes):
        model.add_module(f"l{i}", nn.Linear(columns, rows, bias=False))
    return model


@given(st.integers(0, 10**12), st.integers(0, 1000))
def test_half_up(n, thousandths):
    s = Fraction(thousandths, 1000)
    assert half_up(s * n) == (2 * thousandths * n + 1000) // 2000


@given(st.integers(0, 10**6))
def test_a_float_means_what_it_says(millionths):
    assert fraction(float(f"{millionths / 10**6:.6f}")) == Fraction(millionths, 10**6)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (0.145, Fraction(145, 1000)),
        (np.float32(0.9), Fraction(9, 10)),
        (np.float64(0.9), Fraction(9, 10)),
        (torch.tensor(0.9), Fraction(9, 10)),
        (torch.tensor(0.9, dtype=torch.float64), Fraction(9, 10)),
        (torch.nn.Parameter(torch.tensor(0.25)), Fraction(1, 4)),
        (Fraction(2, 3), Fraction(2, 3)),
        (1e-7, Fraction(1, 10**7)),
        (0.0, 0),
        (-0.0, 0),
        (1.0, 1),
    ],
)
def test_fraction_reads(given, want):
    assert fraction(given) == want


@pytest.mark.parametrize(
    "bad", [True, np.True_, "0.9", None, math.nan, math.inf, -0.1, 1.1, -1e-9, Fraction(11, 10), [0.5], 1j]
)
def test_fraction_refuses_with_the_value(bad):
    with pytest.raises(InputError, match=rf"sparsity is {re.escape(repr(bad))}.*such as 0\.9"):
        fraction(bad)


@pytest.mark.parametrize("bad", [1, 0, np.int64(1)])
def test_an_int_could_mean_two_things(bad):
    with pytest.raises(InputTypeError, match=r"write [01]\.0 for a fraction.*or sc\.Count\("):
        fraction(bad)


@pytest.mark.parametrize("bad", [90, 90.0, np.int64(90), np.float32(90), Fraction(90), torch.tensor(90.0)])
def test_a_percentage_is_told_how_it_is_written(bad):
    model = nn.Linear(3, 3)
    for sparsity in (bad, {"weight": bad}):
        with pytest.raises((InputError, InputTypeError), match=r"sparsity is .*90.*: write 0\.9 for 90 %"):
            sc.prune(model, sparsity)
    assert model.weight.all()


@pytest.mark.parametrize(("bad", "remedy"), [(2.5, "write 0.025"), (100.0, "write 1 for"), (1.5, "such as 0.9")])
def test_other_numbers_above_one(bad, remedy):
    with pytest.raises(InputError, match=remedy):
        fraction(bad)


@pytest.mark.parametrize("bad", [5000, -3])
def test_an_int_that_is_no_percentage(bad):
    with pytest.raises(InputTypeError, match=rf"write a fraction such as 0\.9, or sc\.Count\({bad}\)"):
        fraction(bad)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.tensor(1), torch.tensor(True)])
def test_fraction_refuses_other_tensors(bad):
    with pytest.raises(InputError, match=r"such as 0\.9"):
        fraction(bad)


@pytest.mark.parametrize("bad", [-1, True, 1.0, "3", None])
def test_count_wants_a_whole_number(bad):
    with pytest.raises(InputError, match="whole number of weights"):
        sc.Count(bad)


def test_explicit_globs_the_last_wins():
    model = net((10, 10), (10, 10), (10, 10))
    masks = sc.prune(model, {"*": 0.2, "l1": 0.9, "l2.wei*": Fraction(1, 2)})
    assert masks.counts() == {"l0.weight": 20, "l1.weight": 90, "l2.weight": 50}


def test_explicit_leaves_the_others_dense():
    model = net((10, 10), (10, 10))
    masks = sc.prune(model, {"l0.weight": 0.5})
    assert list(masks) == ["l0.weight"]
    assert model.l1.weight.count_nonzero() == 100


def test_explicit_knows_the_other_names_of_a_tied_tensor():
    names, aliases = ["embed.weight", "body.weight"], {"embed.weight": ["lm_head.weight"]}
    for glob in ("lm_head", "lm_head.weight", "*head*", "embed"):
        assert explicit({glob: 0.5}, names, aliases) == {"embed.weight": Fraction(1, 2)}


def test_explicit_is_checked():
    with pytest.raises(UnknownNameError, match=r"'l9\*' matches no tensor in scope; .*l0\.weight"):
        sc.prune(net((3, 3)), {"l9*": 0.5})
    with pytest.raises(InputTypeError, match=r"write 1\.0 for a fraction.*or sc\.Count\(1\)"):
        sc.prune(net((3, 3)), {"l0*": 1})
    with pytest.raises(InputTypeError, match=r"0 names no tensor: write .*\{'encoder\.\*': 0\.9\}"):
        sc.prune(net((3, 3)), {0: 0.5})
    with pytest.raises(InputError, match="cannot be pruned"):
        sc.prune(net((3, 3), (4, 4)), {"l0*": 1.0})
