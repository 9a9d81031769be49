"""Rows A42 and B of sharded models: the masks of one process, bit for bit, wherever the weights lie."""

import copy
import math

import pytest
import torch
from torch.distributed import checkpoint as dcp

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError, PatternError, SecateurError, StateError
from sharded_models import (
    LAYOUTS,
    App,
    X,
    alike,
    begun,
    columns,
    full,
    hybrid,
    net,
    plain,
    rows,
    steps,
    tensors_in_parallel,
)


def one_shot(rank, ranks):
    tried = 0
    for layout in LAYOUTS[ranks]:
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("normal", "tied", "constant"):
                for options in ({}, {"allocation": "uniform"}, {"allocation": "erk"}):
                    for sparsity in (0.5, 0.9):
                        whole, sharded = net(dtype, kind), layout(net(dtype, kind), ranks)
                        masks = sc.prune(whole, sparsity, **options)
                        alike(whole, sharded, masks, sc.prune(sharded, sparsity, **options))
                        tried += 1
    assert tried == 36 * len(LAYOUTS[ranks])


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4])
def test_a42_the_masks_are_those_of_the_whole_model(ranks):
    in_a_group(ranks, one_shot, ranks)


def gradually(rank, ranks):
    """The same batch on each process, so that the averaged gradients are those of one."""
    for layout in LAYOUTS[ranks]:
        for score in ("magnitude", "taylor"):
            if layout is tensors_in_parallel and score == "taylor":
                continue  # its gradients are summed in another order
            models = net(), layout(net(), ranks)
            optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
            pruners = [sc.Pruner(m, 0.8, schedule=sc.cubic(0, 10, every=2), score=score) for m in models]
            for pruner, optimizer in zip(pruners, optimizers, strict=True):
                pruner.attach(optimizer)
            for step in range(14):
                for model, optimizer in zip(models, optimizers, strict=True):
                    steps(model, optimizer, 1)
                assert pruners[0].masks.counts() == pruners[1].masks.counts()
                if step == 9:  # the masks have changed just now
                    moment = full(optimizers[1].state[models[1].up.weight]["exp_avg"])
                    assert not moment[~full(pruners[1].masks["up.weight"])].any()
                    assert moment.any()
            masks, theirs = (pruner.finish() for pruner in pruners)
            if layout is not tensors_in_parallel:
                alike(*models, masks, theirs)
            assert sc.remask(models[1], theirs) == dict.fromkeys(theirs, 0.0)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_schedule_gives_them_too(ranks):
    in_a_group(ranks, gradually, ranks)


def seen_before(rank, ranks):
    """The root keeps whole copies of its weights after a forward that no backward follows."""
    whole, sharded = net(), rows(net(), ranks)
    with torch.no_grad():
        sharded(X)
    alike(whole, sharded, sc.prune(whole, 0.7), sc.prune(sharded, 0.7))
    with torch.no_grad():
        assert torch.equal(sharded(X), whole(X))
    model = rows(net(), ranks)
    model.set_reshard_after_backward(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 3))
    pruner.attach(optimizer)
    for _ in range(4):
        model(X).square().mean().backward()
        optimizer.step()
    assert sc.check(model, pruner.finish()) == {}
    weight = model.up.weight
    with torch.no_grad():
        model(X)
    assert int((full(weight) == 0).sum()) == pruner.masks.counts()["up.weight"]


def test_whole_copies_of_a_forward_are_not_what_is_pruned():
    in_a_group(2, seen_before, 2)


def made_before(rank, ranks):
    """Masks of before the sharding."""
    whole = net()
    masks = sc.prune(whole, 0.6)
    sharded = rows(copy.deepcopy(whole), ranks)
    assert sc.check(sharded, masks) == {}
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    pruner = sc.Pruner(sharded, masks)
    pruner.attach(optimizer)
    for _ in range(3):
        sharded(X).square().mean().backward()
        optimizer.step()
    assert sc.check(sharded, masks) == {}
    assert pruner.finish().counts() == masks.counts()
    fresh = rows(net(), ranks)
    masks.apply(fresh)
    assert sc.check(fresh, masks) == {}


def test_masks_of_before_the_sharding_are_held():
    in_a_group(2, made_before, 2)


def refused(rank, ranks):
    def untouched(match, call, kind=SecateurError):
        before = [weight.to_local().clone() for weight in model.parameters()]
        with pytest.raises(kind, match=match):
            call()
        assert all(
            torch.equal(a, w.to_local()) or a.isnan().any() for a, w in zip(before, model.parameters(), strict=True)
        )

    model = rows(net(), ranks)
    untouched(
        "up.weight along dim 0 cut groups of the pattern lines.*along another dimension.*before sharding",
        lambda: sc.prune(model, 0.5, pattern="columns"),
        PatternError,
    )
    user = lambda name, weight: weight / weight.abs().sum()  # noqa: E731
    untouched("the score .* looks at whole tensors.*elementwise", lambda: sc.prune(model, 0.5, score=user), InputError)
    drawn = sc.scores.random(rank)
    untouched("generator of the score is not in the same state.*one seed", lambda: sc.prune(model, 0.5, score=drawn))
    untouched("the allocation .* looks at whole tensors", lambda: sc.prune(model, 0.5, allocation="lamp"), InputError)
    whole = "up.weight.* is sharded.*: sc.save the model, and .* it where it is whole, after sc.load"
    untouched(whole, lambda: sc.accelerate(model, X), InputError)
    untouched(whole, lambda: sc.compare({"a": model}, X), InputError)
    untouched(
        "up.weight is sharded: shrink the whole model on one process", lambda: sc.shrink(model, X, 0.5), InputError
    )
    model.save_pretrained = None
    untouched("write them with sc.save", lambda: sc.save_pretrained(model, "none"), InputError)
    untouched("looks at whole ones: leave regrow out", lambda: sc.Pruner(model, 0.5, regrow="str"))
    untouched(
        "process 1 has sparsity of down.weight 0.9, process 0 has 0.8.*call it alike",
        lambda: sc.prune(model, 0.9 if rank else 0.8),
    )
    words = "outside 0 to 1" if rank else "process 1 stopped with InputError: sparsity is 1.5.*call it alike"
    untouched(words, lambda: sc.prune(model, 1.5 if rank else 0.8))
    untouched("process 1 has", lambda: sc.prune(model, 0.8, scope=sc.weights(model, skip=["head"]) if rank else None))
    if rank == 1:
        with torch.no_grad():
            model.down.weight.to_local()[0, 0] = math.nan
    for allocation in ("global", "uniform"):
        words = (
            "down.weight holds 1 NaN" if rank else "process 1 of 2 stopped with NotFiniteError: down.weight holds 1 NaN"
        )
        untouched(words, lambda allocation=allocation: sc.prune(model, 0.8, allocation=allocation))


def test_what_cannot_be_done_is_an_error_in_all_processes():
    in_a_group(2, refused, 2)


def sharded_late(rank, ranks):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5, schedule=sc.linear(0, 3))
    pruner.attach(optimizer)
    rows(model, ranks)
    model(X).square().mean().backward()
    with pytest.raises(StateError, match=r"up\.weight was sharded since the Pruner was made: make the Pruner"):
        optimizer.step()


def test_sharding_after_attach_is_an_error_at_the_next_step():
    in_a_group(2, sharded_late, 2)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def left_off(rank, ranks, folder, options, layout):
    model, optimizer, pruner = begun(layout, ranks, options)
    pruner.attach(optimizer)
    steps(model, optimizer, 5)
    dcp.save({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/middle")
    steps(model, optimizer, 6)
    masks = pruner.finish()
    state = {name: full(weight).clone() for name, weight in model.state_dict().items()}
    kept = {name: full(mask) for name, mask in masks.items()}
    if rank == 0:
        torch.save((state, kept), f"{folder}/end.pt")


def gone_on(rank, ranks, folder, options, layout):
    model, optimizer, pruner = begun(layout, ranks, options)
    dcp.load({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/middle")
    pruner.attach(optimizer)
    assert pruner.steps == 5
    steps(model, optimizer, 6)
    masks = pruner.finish()
    state, kept = torch.load(f"{folder}/end.pt")
    assert all(torch.equal(full(masks[name]), mask) for name, mask in kept.items())
    assert all(torch.equal(full(weight), state[name]) for name, weight in model.state_dict().items())


def kept_and_taken_up(folder, options, first, *others):
    in_a_group(4, left_off, 4, folder, options, first)
    for ranks, layout in others:
        in_a_group(ranks, gone_on, ranks, folder, options, layout)


@pytest.mark.slow
@pytest.mark.parametrize("first", [rows, columns, hybrid])
@pytest.mark.parametrize(
    "options", [{}, {"score": "taylor"}, *({"regrow": way} for way in ("soft_movement", "dpf"))], ids=str
)
def test_a_checkpoint_goes_on_anywhere(tmp_path, options, first):
    others = (4, first), (2, rows), (2, columns), (1, plain), (4, hybrid)
    kept_and_taken_up(str(tmp_path), options, first, *others)


@pytest.mark.parametrize("options", [{"score": "taylor"}, {"regrow": "soft_movement"}], ids=str)
def test_a_checkpoint_goes_on_with_other_processes(tmp_path, options):
    kept_and_taken_up(str(tmp_path), options, rows, (2, columns), (1, plain))
