"""Rows A42 and B of sharded models: whatever is asked, they choose as whole ones do, or refuse it."""

import random

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError, SecateurError, StateError
from sharded_models import LAYOUTS, X, alike, full, net, rows, steps, tensors_in_parallel

PATTERNS = (
    None,
    None,
    "1:4",
    "2:4",
    "rows",
    "columns",
    "4x4",
    "2x1",
    "1x8",
    sc.n_m(1, 3, tail="keep"),
    sc.blocks(3, 2, tail="keep"),
)


class Words(nn.Module):
    """A padding row, a tied weight, a frozen one."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 8, padding_idx=5)
        self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 13)
        self.out.weight = self.words.weight
        self.side = nn.Linear(8, 12)
        self.side.weight.requires_grad_(False)

    def forward(self, x):
        x = self.down(torch.tanh(self.up(self.words(x))))
        return self.out(x) + self.side(x).sum(-1, keepdim=True)


def words(dtype, kind):
    torch.manual_seed(0)
    model = Words()
    with torch.no_grad():
        for weight in (model.words.weight, model.up.weight, model.down.weight, model.side.weight):
            if kind == "tied":
                weight.copy_((weight * 20).round() / 20)
            if kind == "constant":
                weight.fill_(0.25)
    return model.to(dtype)


def sharded(model, mesh, dim):
    """Tied weights must be in one group."""
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(dim) if p.ndim == 2 else None)


def drawn(dice):
    """What is asked for, as a function of the model: a scope is of one model."""
    sparsity = dice.choice(
        [
            round(dice.random() * 0.98, 2),
            sc.Count(dice.randrange(500)),
            {"up": round(dice.random(), 1) * 0.9, "*down*": 0.5, "out.weight": 0.75},
            {"words": 0.4},
        ]
    )
    least = dice.choice([{}, {"min_keep": dice.randrange(1, 60)}, {"min_keep": 0.2}, {"allow_empty": True}])
    allocation = dice.choice([sc.allocation.global_, sc.allocation.uniform, sc.allocation.erk])(**least)
    only = dice.choice([["words", "up", "down", "side"], ["words", "up"], ["*"], ["up", "side"]])
    pattern = sc.patterns.resolve(dice.choice(PATTERNS))
    if pattern is not None and pattern.sparsity is not None:
        sparsity = float(pattern.sparsity)
    score = dice.choice(["magnitude", "magnitude", "table", "random"])
    return sparsity, {"allocation": allocation, "pattern": pattern, "score": score}, {"only": only}


def tried(prune, model, sparsity, options, scope):
    scope = sc.weights(model, **scope)
    if options["score"] == "table":
        generator = torch.Generator().manual_seed(3)
        table = {name: torch.rand(weight.shape, generator=generator) for name, weight in scope.items()}
        options = {**options, "score": table}
    try:
        return prune(model, sparsity, scope=scope, **options)
    except SecateurError as error:
        return error


def choices(rank, ranks, cases):
    mesh = init_device_mesh("cpu", (ranks,))
    meshes = (
        [mesh, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "parts"))] if ranks > 2 else [mesh]
    )
    dice = random.Random(0)
    done = dict.fromkeys(("free", "pattern", "cut"), 0)
    for _ in range(cases):
        dtype = dice.choice([torch.float32, torch.bfloat16])
        kind = dice.choice(["normal", "tied", "constant"])
        one, other = words(dtype, kind), sharded(words(dtype, kind), dice.choice(meshes), dice.randrange(2))
        asked = drawn(dice)
        masks, theirs = tried(sc.prune, one, *asked), tried(sc.prune, other, *asked)
        if isinstance(theirs, Exception) and "cut groups of the pattern" in str(theirs):
            done["cut"] += 1
        elif isinstance(masks, Exception) or isinstance(theirs, Exception):
            assert (type(masks), str(masks)) == (type(theirs), str(theirs)), asked
        else:
            alike(one, other, masks, theirs)
            done["free" if asked[1]["pattern"] is None else "pattern"] += 1
    assert min(done.values()) >= cases // 40, done


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, 40), pytest.param(2, 400, marks=pytest.mark.slow), pytest.param(4, 300, marks=pytest.mark.slow)],
)
def test_a42_whatever_is_asked_is_chosen_as_on_the_whole_model(ranks, cases):
    in_a_group(ranks, choices, ranks, cases)


# ---- masks that move -----------------------------------------------------------------------------------------------

MOVING = {
    "soft_movement": {"regrow": "soft_movement"},
    "dpf": {"regrow": sc.feedback.dpf(every=3)},
    "decay": {"regrow": sc.feedback.sr_ste(decay=0.01, stop=9)},
    "2:4": {"regrow": "sr_ste", "pattern": sc.n_m(2, 4, tail="keep"), "schedule": "one_shot"},
    "rigl": {"regrow": sc.regrow.rigl(every=3, stop=11)},
    "set": {"regrow": sc.regrow.set_(every=3, stop=11), "allocation": "erk"},
    "random": {"score": "random"},
    "blocks": {"pattern": sc.blocks(1, 4, tail="keep")},
}


def moving(rank, ranks, options):
    """The same batch on each process, so that the averaged gradients are those of one."""
    options = {"schedule": sc.cubic(0, 8, every=2), **options}
    for layout in LAYOUTS[ranks] if "pattern" not in options else [rows]:
        models = net(), layout(net(), ranks)
        sparsity = 0.5 if options["schedule"] == "one_shot" else 0.8
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
        pruners = [sc.Pruner(m, sparsity, **options) for m in models]
        for pruner, optimizer in zip(pruners, optimizers, strict=True):
            pruner.attach(optimizer)
        for _ in range(12):
            for model, optimizer in zip(models, optimizers, strict=True):
                steps(model, optimizer, 1)
            masks, theirs = (pruner.masks for pruner in pruners)
            assert masks.counts() == theirs.counts() or layout is tensors_in_parallel
            if layout is not tensors_in_parallel:  # whose gradients are summed in another order
                alike(*models, masks, theirs)
        grown = [pruner.metrics().get("pruning/grown", 1) for pruner in pruners]
        assert min(grown) > 0
        assert grown[0] == grown[1] or layout is tensors_in_parallel
        assert pruners[1].finish().pruned == pruners[0].finish().pruned


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", MOVING)
def test_masks_move_as_those_of_the_whole_model(ranks, way):
    in_a_group(ranks, moving, ranks, MOVING[way])


def put_back(rank, ranks):
    """Dense weights are noted on `detach`, and a change in one process is seen by all of them."""
    model = LAYOUTS[ranks][0](net(), ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, regrow="dpf")
    for _ in range(2):
        pruner.attach(optimizer)
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
        pruner.detach()
    if rank == 1:
        model.up.weight.detach().to_local()[0] += 1
    with pytest.raises(StateError, match=r"up\.weight changed while this pruner was detached.*load the pruner's state"):
        pruner.attach(optimizer)


def test_a_change_beside_the_pruner_is_an_error_in_all_processes():
    in_a_group(2, put_back, 2)


# ---- gradient scores before a training, and choices by a metric ----------------------------------------------------


def square(model, x):
    return model(x).square().mean()


def accumulated(rank, ranks):
    halves = [[x[at::ranks] for x in (X, X.flip(1))] for at in range(ranks)]
    for kind in ("taylor", "snip", "fisher"):
        for spread in LAYOUTS[ranks]:
            whole, model = net(), spread(net(), ranks)
            gradients = {name: torch.ones_like(weight) for name, weight in model.named_parameters()}
            for name, weight in model.named_parameters():
                weight.grad = gradients[name]
            with torch.no_grad():
                model(X)  # the outermost module keeps whole copies
            theirs = sc.accumulate(model, halves[rank] if spread is rows else [X, X.flip(1)], square, score=kind)
            assert all(weight.grad is gradients[name] for name, weight in model.named_parameters())
            masks = sc.prune(whole, 0.7, score=sc.accumulate(whole, [X, X.flip(1)], square, score=kind))
            alike(whole, model, masks, sc.prune(model, 0.7, score=theirs))

    model = rows(net(), ranks)
    with pytest.raises(InputError, match=r"process 1 has batches 1, process 0 has more than 1\. Give equally many"):
        sc.accumulate(model, [X] * (2 - (rank == 1)), square)
    model.up.weight.register_post_accumulate_grad_hook(print)
    with pytest.raises(InputError, match=r"optimizer inside backward, would be called: accumulate first"):
        sc.accumulate(model, [X], square)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulate_sees_the_gradients_that_a_step_would(ranks):
    in_a_group(ranks, accumulated, ranks)


def judged(rank, ranks):
    def metric(model):
        with torch.no_grad():
            return -model(X).square().mean().item()

    whole, model = net(), rows(net(), ranks)
    before = {name: full(weight).clone() for name, weight in model.named_parameters()}
    found = [sc.recommend(one, metric, 0.01) for one in (whole, model)]
    assert {name for _, name, _ in found[1].tried} <= {"global", "uniform", "erk"}
    assert metric(model) == pytest.approx(metric(whole), rel=1e-6)
    with pytest.raises(InputError, match=r"up\.weight is sharded: scan the whole model.*scan\.allocation\(\)"):
        sc.scan(model, metric, [0.5, 0.9])
    scan = sc.scan(whole, metric, [0.5, 0.9])
    choice = sc.choose_allocation(model, metric, 0.6, scan=scan)
    assert list(choice.metrics) == ["global", "uniform", "erk", "sensitivity"]
    theirs = sc.choose_allocation(whole, metric, 0.6, scan=scan).metrics
    assert choice.metrics == pytest.approx({name: theirs[name] for name in choice.metrics}, rel=1e-5)
    after = dict(model.named_parameters())
    assert all(torch.equal(full(after[name]), weight) for name, weight in before.items())
    with pytest.raises(InputError, match=r"process 1 has a metric of 2\.0, process 0 has 1\.0.*all-reduced"):
        sc.choose_allocation(model, lambda model: 1 + rank, 0.6)


def test_a_metric_chooses_for_sharded_models_what_needs_no_whole_tensors():
    in_a_group(2, judged, 2)
