"""Row B12 of sharded models: a process is lost; the others end with a clear error, and a resume is as if none had been.

Each case trains from a checkpoint as a script under torchrun does, and loses process 1 somewhere.
"""

import datetime
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

import secateur as sc
from processes import as_torchrun, in_a_group
from secateur.errors import GroupError
from secateur.support import bits
from secateur.support.process_groups import Grid
from sharded_models import App, full, hybrid, net, rows, steps

TIMEOUT = 4  # seconds, of the group


def begun(layout, ranks):
    model = layout(net(), ranks)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, sc.Pruner(model, 0.8, schedule=sc.cubic(0, 10, every=2), score="taylor")


def middle(layout, ranks, folder):
    model, optimizer, pruner = begun(layout, ranks)
    dcp.load({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/middle")
    pruner.attach(optimizer)
    assert pruner.steps == 5
    return model, optimizer, pruner


def uninterrupted(rank, layout, ranks, folder):
    model, optimizer, pruner = begun(layout, ranks)
    pruner.attach(optimizer)
    steps(model, optimizer, 5)
    dcp.save({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/middle")
    ended(rank, model, optimizer, pruner, f"{folder}/end.pt")


def resumed(rank, layout, ranks, folder):
    ended(rank, *middle(layout, ranks, folder), f"{folder}/again.pt")


def ended(rank, model, optimizer, pruner, path):
    steps(model, optimizer, 6)
    state = {name: full(weight).clone() for name, weight in model.state_dict().items()}
    masks = {name: full(mask) for name, mask in pruner.finish().items()}
    if rank == 0:
        torch.save((state, masks), path)


def die(folder, how):
    """What process 1 does in the place of what all were to do."""
    Path(folder, "died").write_text(str(time.time()))
    if how == "late":
        time.sleep(3 * TIMEOUT)
    os.kill(os.getpid(), signal.SIGKILL)


def loses_one(layout, ranks, folder, how):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    rank = distributed.get_rank()
    model, optimizer, pruner = middle(layout, ranks, folder)
    masks, counts = pruner.masks, pruner.masks.counts()
    if rank == 1:
        lose(folder, how)
    try:
        if how == "save":
            dcp.save({"app": App(model, optimizer), "pruner": pruner}, checkpoint_id=f"{folder}/torn")
        elif how == "attach":
            pruner.detach()
            pruner.attach(optimizer)
        else:
            if rank == 1 and how == "step":
                die(folder, how)
            steps(model, optimizer, 1)
    except (RuntimeError, CheckpointException) as error:
        found = error
    waited = time.time() - float(Path(folder, "died").read_text())
    assert waited < (TIMEOUT + 1 if how == "late" else 1), waited
    if how in ("update", "late"):
        assert type(found) is GroupError
        assert "a process was lost, or did not make the same call, while masks were chosen at step 6: masks and" in str(
            found
        )
        assert "start all processes again, a training from its last checkpoint" in str(found)
        assert isinstance(found.__cause__, RuntimeError)
    if how == "attach":
        assert "while what each of them is to do was compared" in str(found)
    assert pruner.masks is masks
    assert pruner.masks.counts() == counts
    for name, weight in sc.weights(model).items():
        assert bits.alive(weight, masks.packed(name)) == 0, name
    Path(folder, f"told.{rank}").write_text(str(found))
    os._exit(0)  # what is left of the group cannot be taken down in good order


def lose(folder, how):
    """Let this process die in the midst of it."""
    if how in ("update", "late", "attach"):
        left, total = {"update": 4, "late": 2, "attach": 0}[how], Grid.total

        def dying(grid, array):
            nonlocal left
            left -= 1
            if left < 0:
                die(folder, how)
            return total(grid, array)

        Grid.total = dying
    if how == "save":
        FileSystemWriter.write_data = lambda *_: die(folder, how)


def end(path):
    state, masks = torch.load(path)
    return [*state.items(), *masks.items()]


def lost(folder, layout, ranks, how):
    folder = str(folder)
    in_a_group(ranks, uninterrupted, layout, ranks, folder)
    done = as_torchrun(ranks, loses_one, layout, ranks, folder, how)
    survivors = [one for rank, one in enumerate(done) if rank != 1]
    assert [one.returncode for one in survivors] == [0] * (ranks - 1), "\n".join(
        one.stderr[-3000:] for one in survivors
    )
    assert done[1].returncode == -signal.SIGKILL
    assert len([*Path(folder).glob("told.*")]) == ranks - 1
    if how == "save":
        assert not Path(folder, "torn", ".metadata").exists()  # by which a whole checkpoint is told from a torn one
    in_a_group(ranks, resumed, layout, ranks, folder)
    for (name, before), (_, after) in zip(end(f"{folder}/end.pt"), end(f"{folder}/again.pt"), strict=True):
        assert torch.equal(before, after), name


def test_a_process_that_is_killed_while_masks_are_chosen(tmp_path):
    lost(tmp_path, rows, 2, "update")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["step", "save", "late", "attach"])
def test_a_process_that_is_lost_elsewhere(tmp_path, how):
    lost(tmp_path, rows, 2, how)


@pytest.mark.slow
def test_one_of_four_processes_is_lost(tmp_path):
    lost(tmp_path, hybrid, 4, "update")  # the groups of its mesh have a timeout of their own, of half an hour
