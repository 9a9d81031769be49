"""secateur.support.process_groups: together arrays add up and text spreads; no verb looks for a group by itself."""

import contextlib
import datetime
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from processes import as_torchrun, in_a_group, joined
from secateur.errors import GroupError, InputError, StateError, WriteError
from secateur.support.process_groups import ALONE, Grid, Group, collective, during, everyone, shared, together

TEXTS = ["", "/a/place/.out.tmp", "grüße \u4f60\u597d", "x" * 4096]
FAR = {
    "global": (0.9, {}),
    "uniform": (0.9, {"allocation": "uniform"}),
    "erk": (0.9, {"allocation": "erk"}),
    "lamp": (0.9, {"allocation": "lamp"}),
    "random": (0.9, {"score": "random"}),
    "2:4": (0.5, {"pattern": sc.n_m(2, 4)}),
    "rows": (0.5, {"pattern": "rows"}),
    "blocks": (0.5, {"pattern": sc.blocks(4, 4)}),
    "count": (sc.Count(100), {}),
}
needs_groups = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))


def listed(masks):
    return {name: masks[name].tolist() for name in masks}


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(rank, count):
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator)) for _ in range(count)
    ]


def test_alone():
    array = np.arange(3)
    assert (ALONE.rank, ALONE.size) == (0, 1)
    assert ALONE.total(array) is array
    assert array.tolist() == [0, 1, 2]
    assert [everyone(ALONE, text) for text in TEXTS] == [[text] for text in TEXTS]


def adds_up(rank, folder):
    group = Group()
    assert (group.rank, group.size) == (rank, 2)
    for dtype in (np.int64, np.float64, np.float32, np.uint8):
        array = np.array([[1, 2], [3, 4]], dtype) * (rank + 1)
        assert group.total(array) is array
        assert array.tolist() == [[3, 6], [9, 12]]
        assert array.dtype == dtype
    many = np.full(1 << 20, 2**40 + rank)
    assert (group.total(many) == 2**41 + 1).all()
    for text in TEXTS:
        assert everyone(group, text if rank == 0 else "other") == [text, "other"]
    with open(f"{folder}/{rank}", "w") as file:
        file.write("done")


def swaps(rank):
    for shape in ((4,), (2, 2), (4, 1), (1, 4)):
        grid = Grid(init_device_mesh("cpu", shape))
        for most in (0, 5):

            def bytes_of(source, target, most=most):
                return np.arange(
                    10 * source + target, 10 * source + target + (source * target) % (most + 1), dtype=np.uint8
                )

            found = grid.swap([bytes_of(rank, target) for target in range(4)])
            assert [part.tolist() for part in found] == [bytes_of(source, rank).tolist() for source in range(4)]


@needs_groups
def test_each_process_gives_each_one_some_bytes():
    in_a_group(4, swaps)


@contextlib.contextmanager
def a_place(path, log, breaks=""):
    if breaks == "before":
        raise WriteError("no room: make some")
    log.append("in")
    try:
        yield path
        if breaks == "after":
            raise OSError("no room")
    finally:
        log.append("out")


def one_place(rank, folder):
    group, log = Group(), []
    with shared(a_place(Path(folder, "x"), log), group, seen=True) as path:
        assert path == Path(folder, "x")
    assert log == ([] if rank else ["in", "out"])

    def refused(words, place, trouble=None, seen=False):
        with pytest.raises(Exception, match=words):
            enter(place, trouble, seen)

    def enter(place, trouble, seen):
        with shared(place, group, seen=seen):
            if trouble is not None:
                raise trouble

    stopped = "process 0 of 2 stopped with "
    for breaks, words in (("before", "no room: make some"), ("after", "no room")):
        refused(f"{stopped}.*{words}" if rank else f"^{words}", a_place(Path(folder, "x"), log, breaks))
    assert log == ([] if rank else ["in", "out"] * 2)
    for wrong in range(2):
        words = "wrong: do right" if rank == wrong else f"process {wrong} of 2 stopped with InputError: wrong: do right"
        refused(f"^{words}", a_place(Path(folder, "x"), log), InputError("wrong: do right") if rank == wrong else None)
    assert log == ([] if rank else ["in", "out"] * 4)
    lost = Path(folder, "x") if rank else Path(folder, "not there", "x")  # the first one's path counts
    refused(
        "which process 0 made, is not there for process .: give a path on a file system", a_place(lost, log), seen=True
    )
    assert together(group, lambda: rank) == rank


@needs_groups
def test_a_place_that_processes_enter_and_leave_together(tmp_path):
    in_a_group(2, one_place, str(tmp_path))


@needs_groups
def test_two_processes(tmp_path):
    in_a_group(2, adds_up, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def lost(rank, how):
    group = Group(distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1)))
    group.total(np.zeros(1))
    if rank:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        os._exit(0)
    begun = time.perf_counter()
    words = r"while a file was written: masks and .* start all processes again"
    with pytest.raises(GroupError, match=words) as told, during("a file was written"):
        group.total(np.zeros(1))
    assert time.perf_counter() - begun < (1 if how == "killed" else 3)
    assert type(told.value.__cause__).__module__ in ("builtins", "torch.distributed", "torch._C._distributed_c10d")
    os._exit(0)  # the group cannot be left in good order


@needs_groups
@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_process_that_is_lost_or_late_is_told_of(how):
    ranks = as_torchrun(2, joined, lost, how)
    assert ranks[0].returncode == 0, ranks[0].stderr
    assert ranks[1].returncode == (-signal.SIGKILL if how == "killed" else 0)


def test_other_errors_stay():
    with pytest.raises(StateError, match=r"^too early$"), during("a file was written"), collective():
        raise StateError("too early")


class OfGPUs:
    """A DeviceMesh whose group takes tensors of GPUs alone, as one of NCCL does."""

    mesh, shape, device_type = np.array([0, 1]), (2,), "cuda"
    get_group = staticmethod(lambda _: "nccl")


def test_a_group_of_gpus_gets_no_tensor_of_the_cpu(monkeypatch):
    there = []

    class Array:
        def __init__(self, array):
            self.array = array

        def to(self, device):
            there.append((device, self))
            return self

        cpu, numpy = (lambda self: self), (lambda self: self.array)

    monkeypatch.setattr(torch, "from_numpy", Array)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_reduce", lambda sent, group: there.append((group, sent)))
    assert Grid(OfGPUs).total(np.arange(3)).tolist() == [0, 1, 2]
    (device, moved), (group, sent) = there
    assert (device, group) == ("cuda", "nccl")
    assert moved is sent


def prunes_alike(rank, alone):
    for name, (sparsity, options) in FAR.items():
        for model in (net(), DistributedDataParallel(net())):
            assert listed(sc.prune(model, sparsity, **options)) == alone[name], (name, type(model).__name__)
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(0, 2), score="taylor", allocation="uniform")
    pruner.attach(optimizer)
    for batch in batches(rank, 2):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    both = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(both, listed(pruner.finish()))
    assert all(masks == both[0] for masks in both)
    assert pruner.masks.pruned == 2765  # 0.9 of 3,072


@pytest.mark.filterwarnings("ignore:2.weight keeps under 1 %")
@pytest.mark.parametrize("processes", [2, 4])
@needs_groups
def test_a66_each_rank_prunes_what_one_process_would(processes):
    alone = {name: listed(sc.prune(net(), sparsity, **options)) for name, (sparsity, options) in FAR.items()}
    in_a_group(processes, prunes_alike, alone)


def works_alone(rank, folder):
    if rank:
        time.sleep(2)  # and enters no collective until the end
        return
    model = net()
    masks = sc.prune(model, 0.9)
    sc.save(model, f"{folder}/a.safetensors")
    sc.pack(f"{folder}/a.safetensors", f"{folder}/b.safetensors")
    sc.unpack(f"{folder}/b.safetensors", f"{folder}/c.safetensors")
    sc.load(f"{folder}/b.safetensors", into=net())
    assert not sc.check(model, masks)
    str(sc.report(model, masks))
    sc.prune(net(), 0.5, score=sc.accumulate(net(), batches(0, 2), cross_entropy))


@needs_groups
def test_a67_rank_zero_works_alone(tmp_path):
    in_a_group(2, works_alone, str(tmp_path))
    assert (tmp_path / "c.safetensors").is_file()


def averages(rank, alone, counts):
    for score, expected in alone.items():
        model = DistributedDataParallel(net())
        seen = sc.accumulate(model, batches(rank, counts[rank]), cross_entropy, score=score)
        assert not any(parameter.grad is not None for parameter in model.parameters())
        assert listed(sc.prune(model, 0.9, score=seen)) == expected, score
        cross_entropy(model, batches(rank, 1)[0]).backward()  # DDP goes on


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (0, 2)])
@needs_groups
def test_a68_gradient_scores_are_those_of_all_ranks(counts):
    everything = [batch for rank, count in enumerate(counts) for batch in batches(rank, count)]
    alone = {}
    for score in ("taylor", "snip", "movement", "fisher"):
        model = net()
        seen = sc.accumulate(model, everything, cross_entropy, score=score)
        alone[score] = listed(sc.prune(model, 0.9, score=seen))
    in_a_group(2, averages, alone, counts)


def sees_nothing(rank):
    with pytest.raises(sc.errors.InputError, match="give an iterable of at least one batch"):
        sc.accumulate(DistributedDataParallel(net()), [], cross_entropy)


@needs_groups
def test_no_batch_on_any_rank_is_an_error_on_all():
    in_a_group(2, sees_nothing)
