"""Pruned recurrent layers compute alike on states of their own; counts are exact, and the module is only read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from secateur.calibration.closed_loop import product, solve
from secateur.calibration.recurrent import moments, run
from secateur.calibration.solvers.alps import alps
from secateur.calibration.solvers.refit import refit
from secateur.calibration.solvers.wanda import wanda
from secateur.calibration.supports import selector
from secateur.patterns import n_m
from secateur.support.registry import called

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = {
    "lstm": lambda: nn.LSTM(6, 16, 2, batch_first=True),
    "lstm without bias": lambda: nn.LSTM(6, 16, bias=False),
    "lstm both ways": lambda: nn.LSTM(6, 12, 2, bidirectional=True),
    "lstm projected": lambda: nn.LSTM(6, 16, proj_size=8, bidirectional=True),
    "gru": lambda: nn.GRU(6, 16, 2),
    "gru both ways": lambda: nn.GRU(6, 12, bidirectional=True),
    "rnn": lambda: nn.RNN(6, 16),
    "rnn relu": lambda: nn.RNN(6, 16, nonlinearity="relu"),
}


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = KINDS[kind]().eval()
    for parameter in module.parameters():
        parameter.data *= 1.5  # states that matter
    return module


def waves(sequences=24, steps=30, seed=0):
    """Inputs in which times hang together, [steps, sequences, 6]."""
    walk = torch.randn(steps, sequences, 6, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    return (0.5 * walk).sin()


def calls(module, *batches):
    return [run(module, (x.transpose(0, 1) if module.batch_first else x,), {}) for x in batches]


def chooser(module, runs, sparsity, within="row", pattern=None):
    """For each matrix the function that leaves its share of zeros; and the zeros, by pieces."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    selects, zeros = {}, {}
    for one in moments(module, "", runs):
        weights = one.matrix(tensors)
        zeros[one.pieces] = int(weights.numel() * sparsity)
        selects[one.pieces] = selector(one, shapes, weights, zeros[one.pieces], within=within, pattern=pattern)
    return selects.__getitem__, zeros


def pruned(module, solutions):
    found = copy.deepcopy(module)
    for pieces, (weights, _) in solutions.items():
        at = 0
        for name, start, stop in pieces:
            tensor = found.get_parameter(name).data
            tensor[start:stop] = weights[0, :, at : at + tensor.shape[1]]
            at += tensor.shape[1]
    return found


def outputs(module, x):
    with torch.no_grad():
        return module(x.transpose(0, 1) if module.batch_first else x)[0]


def lost(module, other, x):
    dense = outputs(module, x)
    return float((outputs(other, x) - dense).square().sum() / dense.square().sum())


def solved(module, sparsity, solver=alps, rounds=3, **options):
    runs = calls(module, waves(seed=1), waves(seed=2))
    choose, zeros = chooser(module, runs, sparsity, **options)
    return solve(module, "", runs, solver, choose, rounds=rounds), zeros


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_counted_exactly_and_what_stays_says_the_mask(kind):
    solutions, zeros = solved(made(kind), 0.6)
    assert solutions.keys() == zeros.keys()
    for pieces, (weights, kept) in solutions.items():
        assert int((~kept).sum()) == zeros[pieces]
        assert not weights[~kept].any()
        assert not weights[~kept].signbit().any()
        assert weights.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_without_zeros_the_module_computes_as_before(kind):
    module = made(kind)
    solutions, _ = solved(module, 0.0)
    assert lost(module, pruned(module, solutions), waves(seed=3)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_its_own_are_served_better_than_by_wanda(kind):
    module = made(kind)
    held = waves(seed=3)
    ours, plain = (pruned(module, solved(module, 0.6, solver, rounds)[0]) for solver, rounds in ((alps, 3), (wanda, 0)))
    assert lost(module, ours, held) < 0.8 * lost(module, plain, held)


@pytest.mark.parametrize("kind", ["lstm", "lstm both ways", "lstm projected", "gru", "rnn"])
def test_the_closed_loop_loses_less_than_the_open_one_on_the_data_it_was_fitted_to(kind):
    module = made(kind)
    closed, opened = (pruned(module, solved(module, 0.9, rounds=rounds)[0]) for rounds in (3, 0))
    data = torch.cat([waves(seed=1), waves(seed=2)], 1)
    assert lost(module, closed, data) < 0.95 * lost(module, opened, data)


def test_packed_sequences_are_solved_as_their_padded_steps_are():
    module = made("lstm both ways")
    sequences = [waves(1, n, seed=n)[:, 0] for n in (30, 9, 17, 24)]
    packed = [run(module, (pack_sequence(sequences, enforce_sorted=False),), {})]
    alone = [run(module, (one,), {}) for one in sequences]
    a, b = (solve(module, "", runs, alps, chooser(module, runs, 0.5)[0], rounds=1) for runs in (packed, alone))
    for pieces, (weights, kept) in a.items():
        assert torch.equal(kept, b[pieces][1])
        torch.testing.assert_close(weights, b[pieces][0], rtol=1e-2, atol=1e-3)


def test_zeros_that_are_there_stay():
    module = made("gru")
    module.weight_hh_l0.data[:, ::2] = 0.0
    solutions, zeros = solved(module, 0.6)
    for pieces, (weights, kept) in solutions.items():
        if pieces[1].name == "weight_hh_l0":
            assert not kept[..., 6::2].any()
            assert not weights[..., 6::2].any()
        assert int((~kept).sum()) == zeros[pieces]


def test_a_pattern_is_laid_on_each_tensor():
    module = nn.LSTM(8, 16)
    module.weight_ih_l0.data.normal_(generator=torch.Generator().manual_seed(0))
    runs = [run(module, (torch.cat([waves(seed=1), waves(seed=2)], 2)[..., :8],), {})]
    choose, _ = chooser(module, runs, 0.5, pattern=n_m(2, 4))
    ((_, kept),) = solve(module, "", runs, alps, choose).values()
    assert (kept.view(1, 64, 6, 4).sum(-1) == 2).all()


def test_any_solver_serves_also_one_that_keeps_given_masks():
    module = made("rnn")
    given = torch.arange(16 * 22).view(1, 16, 22) % 3 > 0

    def survivors(weights, curvature, select):
        kept = select(weights)
        return refit(weights, weights, kept, curvature), kept

    runs = calls(module, waves(seed=1))
    ((weights, kept),) = solve(module, "", runs, called(survivors, refit), lambda _: lambda scores: given).values()
    assert torch.equal(kept, given)
    assert torch.equal(weights != 0, given)


def test_states_that_explode_do_not_spoil_the_result():
    module = made("rnn relu")
    module.weight_hh_l0.data *= 4  # each step makes states larger
    solutions, _ = solved(module, 0.5)
    assert all(weights.isfinite().all() for weights, _ in solutions.values())


def test_the_module_and_random_numbers_stay_as_they_are_and_results_repeat():
    module = made("gru both ways").train()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    (a, _), (b, _) = solved(module, 0.6), solved(module, 0.6)
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(a[pieces][0], b[pieces][0]) for pieces in a)


def test_products_are_added_up_in_float64():
    a, b = (
        torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)),
        torch.randn(5000, 4, generator=torch.Generator().manual_seed(1)),
    )
    torch.testing.assert_close(product(a, b), a.double().T @ b.double(), rtol=1e-6, atol=1e-4)
