"""The ways that are tried: the asked one first, the quick one beside the default."""

import torch
from torch import nn

import secateur as sc
from secateur.calibration.matrices import matrices
from secateur.calibration.solvers import SOLVERS
from secateur.calibration.supports import selector
from secateur.calibration.ways import Solutions, fast, loops, ways


def names(*args):
    return [way.name for way in ways(*args)]


def test_which():
    assert names(SOLVERS.find("alps"), "full") == ["alps", "wanda with refit"]
    assert names(SOLVERS.find("alps"), "fast") == ["wanda with refit"]
    assert names(SOLVERS.find("magnitude"), "full") == ["magnitude"]
    assert ways(SOLVERS.find("wanda"), "full")[0].within == "row"
    assert names(SOLVERS.find("alps"), "full", True) == [
        "alps, closed loop",
        "alps, open loop",
        "alps, open loop, compared across rows",
        "wanda with refit",
    ]


def test_fast_is_wanda_with_better_values():
    model = nn.Linear(16, 8)
    stats = sc.calibrate(model, [torch.randn(64, 16).cumsum(1)])
    (matrix,) = matrices(sc.weights(model), stats.moments)

    def select(part, within):
        return selector(part.moments, part.shapes, part.weights(), 64, within=within)

    way = ways(SOLVERS.find("alps"), "fast")[0]
    ((part, weights, kept),) = Solutions([matrix], select).of(way)
    assert part is matrix
    wanda, chosen = SOLVERS.find("wanda")(matrix.weights(), matrix.curvature, select(matrix, "row"))
    assert torch.equal(kept, chosen)
    assert matrix.loss(weights) < matrix.loss(wanda)
    assert torch.equal(fast(matrix.weights(), matrix.curvature, select(matrix, "row"))[0], weights)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 12, 2, bidirectional=True)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def test_recurrent_modules_are_solved_as_a_whole_and_the_others_once():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = Tagger().eval(), list(torch.randn(6, 15, 8, 6).cumsum(1).sin())
    stats, scope = sc.calibrate(model, batches), sc.weights(model)
    parts = matrices(scope, stats.moments)
    (loop,) = loops(model, stats.runs, parts)
    assert (loop.prefix, len(loop.parts), len(parts)) == ("lstm", 4, 5)

    def select(part, within):
        return selector(part.moments, part.shapes, part.weights(), part.size // 2, within=within)

    work = Solutions(parts, select, [loop])
    closed, opened, *_ = (work.of(way) for way in ways(SOLVERS.find("alps"), "full", True))
    assert {id(part) for part, *_ in closed} == {id(part) for part in parts}
    assert closed[-1][1] is opened[-1][1]
    for part, weights, kept in closed:
        assert int((~kept).sum()) == part.size // 2
        assert not weights[~kept].any()


def test_a_module_of_which_a_part_stays_dense_is_none_of_them():
    model = Tagger().eval()
    stats = sc.calibrate(model, list(torch.randn(6, 15, 8, 6)))
    parts = matrices(sc.weights(model, skip=["*_l1*"]), stats.moments)
    assert loops(model, stats.runs, parts) == []


def test_oneshot_says_which_way_it_took_and_a_refit_serves_any_mask():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = Tagger().eval(), list(torch.randn(10, 15, 8, 6).cumsum(1).sin())
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    stats = sc.calibrate(model, batches)
    x = torch.randn(15, 8, 6, generator=torch.Generator().manual_seed(1)).cumsum(0).sin()
    with torch.no_grad():
        expected = model(x)
        masks = sc.oneshot(model, stats, 0.7)
        ours = (model(x) - expected).square().sum()
        assert "loop" in str(masks)
        assert all(bool((model.get_parameter(name)[~kept] == 0).all()) for name, kept in masks.items())
        model.load_state_dict(dense)
        plain = sc.prune(model, 0.7, allocation="uniform")
        worst = (model(x) - expected).square().sum()
        sc.refit(model, plain, stats, dense=dense)
        assert (model(x) - expected).square().sum() < 0.8 * worst
        assert ours < 0.5 * worst
