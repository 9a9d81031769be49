"""On several CUDA devices: over NCCL, whose groups take no tensor of the CPU, the masks are those of one process."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import secateur as sc
from processes import as_torchrun
from sharded_models import X, full, net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def over_nccl(options):
    distributed.init_process_group("nccl")
    rank = distributed.get_rank()
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (2,))
    whole = sc.prune(net(), 0.8)
    model = fully_shard(net().cuda() if not options else net(), mesh=mesh, **options)
    masks = sc.prune(model, 0.8)
    assert masks.counts() == whole.counts()
    assert all(torch.equal(full(mask).cpu(), whole[name]) for name, mask in masks.items())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(0, 4), score="taylor", allocation="uniform")
    pruner.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(X.cuda()).square().mean().backward()
        optimizer.step()
    again = sc.Pruner(model, 0.9, schedule=sc.linear(0, 4), score="taylor", allocation="uniform")
    again.load_state_dict(pruner.state_dict())
    assert sc.check(model, pruner.finish()) == {}
    assert again.masks == pruner.masks
    distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"offload_policy": CPUOffloadPolicy()}], ids=["", "offload"])
def test_the_masks_are_those_of_one_process(options):
    done = as_torchrun(2, over_nccl, options)
    assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:] + done[1].stderr[-2000:]
