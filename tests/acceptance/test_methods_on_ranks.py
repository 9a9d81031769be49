"""Every registered method where two processes train one model on data of their own: exact counts, equal masks."""

import hashlib
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from models import k
from processes import as_torchrun, in_a_group

STEPS, START, STOP, EVERY = 18, 2, 12, 3
CURVE = sc.cubic(START, STOP, every=EVERY)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def batch(rank, step):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + rank))
    return x, x[:, :8].argmax(1)


def loss(model, data):
    return cross_entropy(model(data[0]), data[1])


BUILT = {
    "synflow": lambda model, rank: sc.scores.synflow(model, batch(rank, 0)[0]),
    "grasp": lambda model, rank: sc.scores.grasp(model, [batch(rank, step) for step in (0, 1)], loss),
}
"""The scores that need more than their names, of the model and the rank."""


def methods():
    """What is given to a Pruner beside the model, by a name; a score of `BUILT` is still its name."""
    every = {f"score {name}": (0.8, {"schedule": CURVE, "score": name}) for name in sc.scores.SCORES}
    for name in sc.schedules.SCHEDULES:
        every[f"schedule {name}"] = 0.8, {"schedule": sc.schedules.Schedule(name, START, STOP, EVERY)}
    for name in sc.allocation.ALLOCATIONS:
        every[f"allocation {name}"] = 0.8, {"schedule": CURVE, "allocation": name, "score": "taylor"}
    for name in sc.patterns.PATTERNS:
        every[f"pattern {name}"] = 0.5, {"schedule": CURVE, "pattern": name, "score": "taylor"}
    for name in sc.regrow.REGROWTHS:
        moves = sc.regrow.Regrowth(name, EVERY, stop=STEPS)
        every[f"regrow {name}"] = 0.8, {"score": "random", "allocation": "erk", "regrow": moves}
    for name in sc.feedback.FEEDBACKS:
        every[f"feedback {name}"] = 0.8, {"schedule": CURVE, "regrow": name}
    return every


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(model, rank, name):
    """Train by one method; what each change of the masks, and the end, came to."""
    sparsity, options = methods()[name]
    score = options.get("score")
    if score in BUILT:
        options = {**options, "score": BUILT[score](model, rank)}
    inner = getattr(model, "module", model)
    pruner = sc.Pruner(model, sparsity, **options)
    told = []

    def changed(_):
        assert not sc.check(inner, pruner.masks), (name, pruner.steps)
        told.append((pruner.steps, pruner.masks.pruned, digest(pruner.masks.packed(one) for one in pruner.masks)))

    pruner.on_update(changed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, batch(rank, step)).backward()
        optimizer.step()
    pruner.finish()
    return told, digest(inner.parameters())


def alike(rank, names):
    warnings.simplefilter("ignore", sc.errors.SecateurWarning)
    for name in names:
        found = train(DistributedDataParallel(net()), rank, name)
        both = [None, None]
        torch.distributed.all_gather_object(both, found)
        assert both[0] == both[1], name
        require_exact(name, found[0])


def require_exact(name, told):
    """See that the masks changed, to what the schedule asks for at each change."""
    sparsity, options = methods()[name]
    schedule = options.get("schedule", sc.schedules.one_shot())
    size = sum(weight.numel() for weight in sc.weights(net()).values())
    unit = {"4x4": 16, "rows": 32, "columns": 32}.get(options.get("pattern"), 1)  # the largest
    assert len(told) > 1 or name == "schedule one_shot", name
    for step, pruned, _ in told:
        asked = k(schedule.sparsity(step, sc.sparsity.fraction(sparsity)), size)
        assert abs(pruned - asked) < unit, (name, step, pruned, asked)


def test_all_scores_are_tried():
    assert set(BUILT) == {name for name, choice in sc.scores.SCORES.items() if choice.call}


@pytest.mark.slow
def test_a66_every_method_on_two_ranks():
    in_a_group(2, alike, list(methods()))


def accelerated(folder):
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.set_num_threads(1)
    from accelerate import Accelerator

    rank, kinds = int(os.environ["RANK"]), ("rigl", "dpf", None)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rows = torch.cat([batch(0, step)[0] for step in range(2 * STEPS)])
    data = torch.utils.data.TensorDataset(rows, rows[:, :8].argmax(1))
    found = []
    for kind in kinds:
        model = net()
        prepared = torch.optim.AdamW(model.parameters()), torch.utils.data.DataLoader(data, batch_size=8)
        model, optimizer, loader = accelerator.prepare(model, *prepared)
        regrow = sc.regrow.rigl(every=EVERY, stop=STEPS) if kind == "rigl" else kind
        pruner = sc.Pruner(model, 0.8, schedule=CURVE, score="magnitude" if kind else "movement", regrow=regrow)
        pruner.attach(optimizer)
        for data_of_rank in loader:
            optimizer.zero_grad()
            accelerator.backward(loss(model, data_of_rank))
            optimizer.step()
        masks = pruner.finish()
        assert (pruner.steps, masks.pruned) == (STEPS, k(0.8, masks.size)), kind
        found.append([digest(masks.packed(name) for name in masks), digest(model.parameters())])
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_a66_accelerate_on_two_ranks(tmp_path):
    done = as_torchrun(2, accelerated, str(tmp_path))
    assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:]
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt")
