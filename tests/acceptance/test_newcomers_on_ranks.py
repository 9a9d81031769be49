"""Row A41: the code that a newcomer writes for torchrun; what one rank may do by itself; saving meanwhile."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint as dcp

import secateur as sc
from processes import as_torchrun, in_a_group
from sharded_models import App, begun, full, net, rows, steps

DDP = """
import torch, secateur as sc
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4)))
torch.manual_seed(rank)  # its own data, and random scores that would differ
optimizer = torch.optim.AdamW(model.parameters())
pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(start=0, stop=8, every=2), score="{score}", allocation="erk")
pruner.attach(optimizer)
for step in range(10):
    optimizer.zero_grad()
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
masks = pruner.finish()
if rank == 0:
    sc.save(model, "{folder}/model.safetensors")
    print(sc.report(model, masks))
torch.save([masks.counts(), sc.check(model, masks), *(masks[name] for name in masks), *model.parameters()],
           f"{folder}/{{rank}}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def as_written(text):
    torch.set_num_threads(1)
    exec(text, {"__name__": "__main__"})


@pytest.mark.parametrize(
    "score", ["magnitude", *(pytest.param(s, marks=pytest.mark.slow) for s in ("random", "taylor"))]
)
def test_a41_the_masks_of_ddp_are_equal_without_being_asked(tmp_path, score):
    done = as_torchrun(2, as_written, DDP.format(folder=tmp_path, score=score))
    assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:] + done[1].stderr[-2000:]
    assert "zeros got" in done[0].stdout
    assert not done[1].stdout
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert zero[:2] == one[:2]
    assert all(torch.equal(a, b) for a, b in zip(zero[2:], one[2:], strict=True))
    assert sum(zero[0].values()) == 1382  # 0.9 of 1,536
    assert list(sc.load(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP.format(folder=tmp_path, score="magnitude"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(zero[2:], one[2:], strict=True))


def alone(rank, ranks):
    """What one rank asks by itself about sharded weights."""
    model = rows(net(), ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.8, schedule=sc.cubic(0, 4))
    pruner.attach(optimizer)
    steps(model, optimizer, 5)
    if rank == 0:
        masks = pruner.masks
        assert "1,015 of 1,269 weights pruned" in repr(masks)
        assert (masks.pruned, masks.size, sum(masks.counts().values())) == (1015, 1269, 1015)
        assert round(masks.sparsity, 2) == round(pruner.sparsity, 2) == 0.8
        assert masks.to("cpu").counts() == masks.counts()
        assert pruner.metrics()["pruning/sparsity"] == pruner.sparsity
        assert pruner.done
        assert "sparsity=0.7998" in str(pruner)
        assert masks["up.weight"].to_local().any()
        str(sc.weights(model))
        other = net()  # a whole model beside it
        sc.report(other, sc.prune(other, 0.5))
    distributed.barrier()


def test_what_one_rank_may_ask_by_itself():
    in_a_group(2, alone, 2)


def asynchronously(rank, ranks, folder):
    """`async_save` with a group of its own, while the training goes on."""
    model, optimizer, pruner = begun(rows, ranks, {"score": "taylor"})
    pruner.attach(optimizer)
    steps(model, optimizer, 5)
    group = distributed.new_group(backend="gloo")
    state = {"app": App(model, optimizer), "pruner": pruner}
    saving = dcp.async_save(state, checkpoint_id=f"{folder}/middle", process_group=group)
    steps(model, optimizer, 6)  # masks change meanwhile
    saving.result()
    ended = [full(weight).clone() for weight in model.parameters()], pruner.finish()

    model, optimizer, pruner = begun(rows, ranks, {"score": "taylor"})
    dcp.load({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/middle")
    pruner.attach(optimizer)
    assert pruner.steps == 5
    steps(model, optimizer, 6)
    assert all(torch.equal(full(a), b) for a, b in zip(model.parameters(), ended[0], strict=True))
    assert pruner.finish() == ended[1]


def test_a_checkpoint_is_saved_while_the_training_goes_on(tmp_path):
    in_a_group(2, asynchronously, 2, str(tmp_path))
