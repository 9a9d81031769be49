"""A small net, sharded in several ways over the processes of a group, beside the whole one."""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import secateur as sc


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(20, 32), nn.Linear(32, 17), nn.Linear(17, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def net(dtype=torch.float32, kind="normal", seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for weight in model.parameters():
            if kind == "tied":
                weight.copy_((weight * 30).round() / 30)
            if kind == "constant":
                weight.fill_(0.25)
    return model.to(dtype)


def rows(model, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def columns(model, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model.up, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    fully_shard(model.down, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    return model  # the head is plain


def hybrid(model, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "parts"))
    fully_shard(model.down, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensors_in_parallel(model, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    return fully_shard(model, mesh=mesh["data"])


def plain(model, ranks):
    return model


LAYOUTS = {2: (rows, columns), 3: (rows,), 4: (rows, columns, hybrid, tensors_in_parallel)}
X = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alike(whole, sharded, masks, theirs):
    assert theirs.counts() == masks.counts()
    assert sc.check(sharded, theirs) == {}
    for name, mask in masks.items():
        assert torch.equal(full(theirs[name]), mask), name
    mine = dict(sharded.named_parameters())
    for name, weight in whole.named_parameters():
        assert torch.equal(full(mine[name]).view(torch.uint8), weight.detach().view(torch.uint8)), name


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def begun(layout, ranks, options):
    model = layout(net(), ranks)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.8, schedule=sc.cubic(0, 10, every=2), **options)
    return model, optimizer, pruner


class App(Stateful):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
