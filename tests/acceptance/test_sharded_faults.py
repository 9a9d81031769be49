"""Rows B5 to B7 of sharded models: processes that disagree or fail say so, all of them, and nothing has changed."""

import math
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError, InputTypeError, MaskError, NotFiniteError, SecateurWarning
from secateur.masks import Masks
from sharded_models import X, columns, full, hybrid, net, rows, steps

CURVE = sc.cubic(0, 10, every=2)


def begun(model, rate=0.01, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    pruner = sc.Pruner(model, 0.8, **{"schedule": CURVE, **options})
    pruner.attach(optimizer)
    return optimizer, pruner


def parts(tensors):
    """Copies of what is here of a model, or of some tensors."""
    tensors = tensors.parameters() if isinstance(tensors, torch.nn.Module) else tensors.values()
    return [torch.Tensor(tensor.to_local().detach()).clone() for tensor in tensors]


def unchanged(model, before):
    return all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, parts(model), strict=True))


def told(rank, words, mine, call, kind=InputError):
    """Rank 1 does something else than rank 0: both are told, and meet again."""
    with pytest.raises(kind if rank else InputError, match=mine if rank else words):
        call()
    distributed.barrier()


def disagree(rank, ranks):
    model = rows(net(), ranks)
    before, other = parts(model), rank == 1
    alike = "process 1 has {}, process 0 has {}.*call it alike in all processes"

    def both(what, theirs, mine, call):
        words = alike.format(f"{what} {theirs}", mine)
        told(rank, words, words, call)

    def fails(words, call, kind=InputError):
        told(rank, f"process 1 stopped with {kind.__name__}: .*{words}.*call it alike", words, call, kind)

    def pruner(**options):
        return sc.Pruner(model, 0.8, **{"schedule": CURVE, **options})

    both("sparsity of down.weight", 0.9, 0.8, lambda: sc.Pruner(model, 0.9 if other else 0.8, schedule=CURVE))
    both("stop of schedule", 12, 10, lambda: pruner(schedule=sc.cubic(0, 12 if other else 10, every=2)))
    both("score", "taylor", "magnitude", lambda: pruner(score="taylor" if other else "magnitude"))
    both("share of allocation", "erk.*", "NoneType", lambda: pruner(allocation="erk" if other else "global"))
    both(
        "sparsity of head.weight", "none", 0.8, lambda: pruner(scope=sc.weights(model, skip="head") if other else None)
    )
    both("regrow", ".*", "none", lambda: pruner(regrow="sr_ste" if other else None))
    fails("choose", lambda: pruner(schedule="cubicle" if other else CURVE), InputError)
    fails("sc.regrow.rigl", lambda: pruner(regrow=3 if other else None), InputTypeError)
    fails("give the optimizer it wraps", lambda: sc.prune(model, 0.8, optimizer=[3] if other else ()), InputTypeError)
    masks = Masks({"up.weight": torch.rand(32, 20) < 0.5})
    wrong = Masks({"up.weight": torch.rand(5, 20) < 0.5})
    for call in (sc.check, sc.remask):
        fails("up.weight has shape", lambda call=call: call(model, wrong if other else masks), MaskError)
    fails("beyond the end|outside 0 to 1", lambda: sc.Pruner(model, 1.8 if other else 0.8))
    assert unchanged(model, before)


def test_who_asks_for_something_else_is_named_and_nothing_has_changed():
    in_a_group(2, disagree, 2)


def steps_apart(rank, ranks):
    other = rank == 1
    words = "process 1 has {}, process 0 has {}.*call it alike in all processes"

    model = rows(net(), ranks)
    pruner = sc.Pruner(model, 0.8, schedule=sc.cubic(0.0, 1.0))
    match = words.format("stop of schedule 12", 10)
    told(rank, match, match, lambda: pruner.over(12 if other else 10))
    pruner.over(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    told(
        rank,
        "process 1 stopped with StateError: nothing|process 1 stopped with InputTypeError",
        "is not a torch.optim.Optimizer",
        lambda: pruner.attach(3 if other else optimizer),
        InputTypeError,
    )
    assert not optimizer._optimizer_step_post_hooks
    if other:
        pruner._steps = 1  # one step more was made here
    match = words.format("steps made 1", 0)
    told(rank, match, match, lambda: pruner.attach(optimizer))

    model = rows(net(), ranks)
    optimizer, pruner = begun(model)
    steps(model, optimizer, 3)
    masks, before = pruner.masks, pruner.masks.counts()
    if other:
        pruner._steps = 4
    if other:  # a change of the masks at step 4 meets one at step 5, where there is none
        pruner._steps = 3
    pruner._schedule = sc.cubic(0, 12 if other else 10, every=2)
    model(X).square().mean().backward()
    match = words.format("stop of schedule 12", 10)
    told(rank, match, match, optimizer.step)
    assert pruner.masks is masks
    assert pruner.masks.counts() == before
    assert sc.check(model, masks) == {}
    pruner._schedule = sc.schedules.Function(lambda step: 0.7 if other else 0.6)  # whose values are not compared before
    match = words.format(r"weights to prune \[\d+\]", r"\[\d+\]")
    told(rank, match, match, optimizer.step)


def test_steps_and_schedules_that_differ_are_told_before_masks_are_chosen():
    in_a_group(2, steps_apart, 2)


def failing(rank, ranks):
    """What one process raises all raise; with a NaN the run goes on, in all processes."""
    warnings.simplefilter("ignore", SecateurWarning)
    other = rank == 1

    def score(name, weight):
        if other and failing:
            raise KeyError("no table")
        return weight.abs()

    for given in (sc.scores.elementwise(score),):
        model = rows(net(), ranks)
        optimizer, pruner = begun(model, score=given)
        failing = False
        steps(model, optimizer, 3)
        failing = True
        masks = pruner.masks
        words = "process 1 of 2 stopped with KeyError: 'no table'; so do the others, and nothing is changed"
        told(rank, words, "no table", lambda: steps(model, optimizer, 1), KeyError)
        assert pruner.masks is masks
        assert sc.check(model, masks) == {}

    model = rows(net(), ranks)
    optimizer, pruner = begun(model)
    steps(model, optimizer, 3)
    masks = pruner.masks
    sound = model.down.weight.to_local().detach().clone()
    if other:
        with torch.no_grad():
            model.down.weight.to_local()[pruner.masks["down.weight"].to_local()] = math.nan
    optimizer.zero_grad()
    with pytest.warns(SecateurWarning, match=r"stay as they are: .*down.weight holds .* NaN"):
        optimizer.step()
    assert pruner.masks is masks
    told(rank, "process", "", lambda: sc.prune(model, 0.9), NotFiniteError)
    with torch.no_grad():
        model.down.weight.to_local().copy_(sound)
    steps(model, optimizer, 7)
    assert pruner.finish().pruned == 1015

    model = rows(net(), ranks)
    optimizer, pruner = begun(model)
    calls = []

    def listen(metrics):
        calls.append(metrics)
        if other and pruner.steps == 2:
            raise OSError("the disk is full")

    if other:
        pruner.on_update(listen)
    steps(model, optimizer, 1)
    words = "process 1 stopped with OSError: the disk is full. The masks were changed in all processes, at step 2"
    told(rank, words, "the disk is full", lambda: steps(model, optimizer, 1), OSError)
    steps(model, optimizer, 8)
    assert pruner.finish().pruned == 1015
    assert len(calls) == 5 * other


def test_what_fails_in_one_process_fails_in_all():
    in_a_group(2, failing, 2)


def damaged(rank, ranks):
    """A state that one process cannot read."""
    other = rank == 1
    for options in ({}, {"score": "taylor"}, {"regrow": "sr_ste"}):
        model = rows(net(), ranks)
        optimizer, pruner = begun(model, **options)
        steps(model, optimizer, 5)
        state = pruner.state_dict()
        fresh = rows(net(), ranks)
        into = sc.Pruner(fresh, 0.8, schedule=CURVE, **options)
        before = into.state_dict()

        def tried(change, words, into=into, state=state, kind=InputError):
            broken = dict(state)
            if other:
                change(broken)
            told(
                rank, f"process 1 stopped with {kind.__name__}: .*{words}", words, lambda: into.load_state_dict(broken)
            )
            assert into.steps == 0
            assert into.masks.pruned == 0

        tried(lambda s: s.pop("bits"), "it has no 'bits'")
        tried(lambda s: s.update(steps=-1), "its steps are -1.*load an earlier checkpoint")
        tried(lambda s: s.update(counts=[1.5]), "its counts are.*load an earlier checkpoint")
        bad = {**state["bits"], "head.weight": torch.zeros(3, dtype=torch.uint8)}
        tried(lambda s: s.update(bits=bad), "the bits of head.weight are.*load an earlier checkpoint")
        if "score" in options:
            poisoned = DTensor.from_local(
                torch.full_like(state["sums"]["up.weight"].to_local(), math.nan),
                fresh.up.weight.device_mesh,
                [Shard(0)],
            )
            tried(lambda s: s.update(sums={**s["sums"], "up.weight": poisoned}), "its sum of gradients of up.weight")
        if "regrow" in options:
            tried(lambda s: s.update(withheld={}), "its dense weights are.*load an earlier checkpoint")
        words = r"process 1 has steps saved 6, process 0 has 5|settings"
        told(rank, words, words, lambda: into.load_state_dict({**state, "steps": 6 if other else 5}))
        assert into.state_dict()["counts"] == before["counts"]
        into.load_state_dict(state)
        assert into.steps == 5
        assert into.masks == pruner.masks
    elsewhere = sc.Pruner(rows(net(), ranks), 0.8, schedule=CURVE)
    words = "the saved pruner has other settings: regrow.*build this one with the same"
    with pytest.raises(InputError, match=words):
        elsewhere.load_state_dict(state)


def test_a_state_that_one_process_cannot_read_is_read_by_none():
    in_a_group(2, damaged, 2)


def drifted(rank, ranks):
    for layout in (hybrid, columns):
        model = layout(net(), ranks)
        optimizer, pruner = begun(model)
        steps(model, optimizer, 3)
        masks = pruner.masks
        weight = model.head.weight
        part = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
        if rank == ranks - 1:  # of the second replica
            with torch.no_grad():
                part.mul_(torch.linspace(0.1, 3, part.numel()).view(part.shape))
        optimizer.zero_grad()
        with pytest.raises(InputError, match=r"the copies of head.weight in several processes differ.*a checkpoint"):
            optimizer.step()
        assert pruner.masks is masks
        assert sc.check(model, masks) == {}


@pytest.mark.slow
def test_copies_that_drifted_are_an_error():
    in_a_group(4, drifted, 4)


def other_layouts(rank, ranks):
    """Parts fit no other parts, and Pruners of masks of parts go through checkpoints."""
    model = rows(net(), ranks)
    masks = sc.prune(model, 0.7)
    for other in (columns(net(), ranks), net()):
        before = [full(weight).clone() for weight in other.parameters()]
        for call in (
            masks.apply,
            lambda m: sc.check(m, masks),
            lambda m: sc.remask(m, masks),
            lambda m: sc.Pruner(m, masks),
        ):
            with pytest.raises(MaskError, match=r"of parts that lie otherwise than .* full_tensor\(\)"):
                call(other)
        assert all(torch.equal(full(a), b) for a, b in zip(other.parameters(), before, strict=True))
        whole = Masks({name: full(mask) for name, mask in masks.items()})
        whole.apply(other)
        assert sc.check(other, whole) == {}
    holding = rows(net(), ranks), rows(net(), ranks)
    pruners = []
    for one in holding:
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        pruners.append(sc.Pruner(one, masks))
        pruners[-1].attach(optimizer)
        steps(one, optimizer, 2)
        assert sc.check(one, masks) == {}
    pruners[1].load_state_dict(pruners[0].state_dict())
    others = sc.prune(rows(net(seed=1), ranks), 0.7)
    late = sc.Pruner(rows(net(), ranks), others)
    with pytest.raises(
        InputError, match=r"holds other masks of .*|other settings: masks.* build this one with the same"
    ):
        late.load_state_dict(pruners[0].state_dict())
    masks.to("cpu").counts()


def test_masks_of_parts_fit_no_other_parts():
    in_a_group(2, other_layouts, 2)


class Coded(torch.Tensor):
    """Numbers in a code."""


def unfit(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))

    def refused(words, **weights):
        model = net()
        for name, weight in weights.items():
            is_ready = isinstance(weight, torch.nn.Parameter)
            getattr(model, name).weight = weight if is_ready else torch.nn.Parameter(weight)
        before = parts(weights)
        for call in (lambda: sc.prune(model, 0.5), lambda: sc.Pruner(model, 0.5)):
            with pytest.raises(InputError, match=words):
                call()
        assert all(map(torch.equal, before, parts(weights)))
        distributed.barrier()

    partial = DTensor.from_local(torch.rand(32, 20), mesh, [Partial()], run_check=False)
    refused("up.weight holds sums that are not complete .*: redistribute it, or leave it out", up=partial)
    coded = torch.nn.Parameter(DTensor.from_local(torch.rand(8, 20), mesh, [Shard(0)], run_check=False))
    coded._local_tensor = coded._local_tensor.as_subclass(Coded)
    refused("up.weight holds Coded, no plain numbers: leave it out of the scope", up=coded)
    words = "is no part of .*: prune them one by one, each with a scope of its own"
    for ranks_of_one, ranks_of_other in (([[0, 1], [2, 3]], [0, 3]), ([0, 1], [2, 3])):
        one, other = (DeviceMesh("cpu", found) for found in (ranks_of_one, ranks_of_other))
        sharded = [Shard(0), Replicate()][: one.ndim]
        up = distribute_tensor(torch.rand(32, 20), one, sharded)
        refused(words, up=up, down=distribute_tensor(torch.rand(17, 32), other, [Shard(0)]))


@pytest.mark.slow
def test_what_cannot_be_pruned_as_it_is_spread_is_refused():
    in_a_group(4, unfit, 4)
