"""What stands around a pruning, on sharded models: as on whole ones, or refused by name on all processes."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import secateur as sc
from processes import in_a_group
from secateur.errors import InputError
from sharded_models import X, alike, net, rows, steps


def schedules(rank):
    """A function that says something else in one process, or raises, where the others would choose no masks."""

    def late(step):
        return 0.5 if step >= 2 + rank else 0.0

    def broken(step):
        if step == 2 and rank:
            raise ValueError("no number today")
        return 0.0

    for schedule, kind, words in (
        (late, InputError, "process 1 has weights to prune .* alike in all"),
        (broken, ValueError if rank else InputError, "no number today"),
    ):
        model = rows(net(), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = sc.Pruner(model, 0.5, schedule=schedule)
        pruner.attach(optimizer)
        steps(model, optimizer, 1)
        with pytest.raises(kind, match=words):
            steps(model, optimizer, 1)
        assert pruner.masks.pruned == 0


def rewound():
    """Back to an early step, as the whole model."""
    models = net(), rows(net(), 2)
    masks = [sc.prune(copy.deepcopy(models[0]), 0.5), sc.prune(rows(net(), 2), 0.5)]
    for model, held in zip(models, masks, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        early = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        steps(model, optimizer, 2)
        with pytest.raises(InputError, match=r"keep copy\.deepcopy"):
            sc.rewind(model, model.state_dict(), held)
        sc.rewind(model, early[0], held, optimizer=optimizer, optimizer_state=early[1])
    alike(*models, *masks)


def accumulated():
    """Each process has a part of the batch, and its gradient of a copy of the weights is a part of the sum."""
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Linear(20, 8, bias=False)
    sharded = nn.Linear(20, 8, bias=False)
    with torch.no_grad():
        whole.weight.copy_(torch.arange(160.0).view(8, 20) / 64)
    sharded.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Replicate()]))
    batch = (X * 4).round() / 4
    part = DTensor.from_local(batch.chunk(2)[mesh.get_rank()], mesh, [Shard(0)])

    def loss(model, batch):
        return model(batch).sum()

    masks = sc.prune(whole, 0.5, score=sc.accumulate(whole, [batch], loss))
    alike(whole, sharded, masks, sc.prune(sharded, 0.5, score=sc.accumulate(sharded, [part], loss)))


def all_of_it(rank):
    schedules(rank)
    rewound()
    accumulated()


def test_helpers_of_sharded_models_do_what_they_do_with_whole_ones_or_refuse_by_name():
    in_a_group(2, all_of_it)
