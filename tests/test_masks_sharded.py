"""secateur.masks of sharded models: what masks of the whole weights give, files too."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import secateur as sc
from processes import in_a_group
from secateur import masks
from secateur.errors import InputError, MaskError, SecateurError, StateError, WriteError
from sharded_models import LAYOUTS, full, net, rows

ONE = [Shard(0), Shard(1)]


def same_bytes(rank, ranks, folder):
    masks.BLOCK = 64
    for layout in LAYOUTS[ranks]:
        held = sc.prune(net(), 0.7)
        sharded = layout(net(), ranks)
        theirs = sc.prune(sharded, 0.7)
        alone, together = Path(folder, f"alone{rank}"), Path(folder, "together")
        held.save(alone)
        theirs.save(together)
        distributed.barrier()
        assert together.read_bytes() == alone.read_bytes()
        assert sc.check(sharded, sc.Masks.load(together)) == {}
        beside = {"beside": torch.arange(5) > 2}
        sc.Masks({**held, **beside}).save(alone)
        sc.Masks({**theirs, **beside}).save(together)
        distributed.barrier()
        assert together.read_bytes() == alone.read_bytes()
        distributed.barrier()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_file_is_that_of_whole_masks(tmp_path, ranks):
    in_a_group(ranks, same_bytes, ranks, str(tmp_path))


def troubles(rank, folder):
    theirs = sc.prune(rows(net(), 2), 0.7)
    old = Path(folder, "old")
    theirs.save(old)
    before = old.read_bytes()
    distributed.barrier()
    with pytest.raises(InputError, match=r"process 1 has path .*other.*call it alike"):
        theirs.save(Path(folder, "other") if rank else old)
    stopped = "process 0 of 2 stopped with WriteError: .*" * rank
    with pytest.raises(WriteError, match=f"{stopped}make its folder"):
        theirs.save(Path(folder, "none", "x"))
    pack, masks.bits.pack = masks.bits.pack, full_disk
    with pytest.raises(WriteError, match=f"{stopped}No space .* intact"):
        theirs.save(old)
    masks.bits.pack = pack
    distributed.barrier()
    assert old.read_bytes() == before
    assert [path.name for path in Path(folder).iterdir()] == ["old"]


def full_disk(_):
    raise OSError(28, "No space left on device")


def test_what_one_process_raises_all_raise(tmp_path):
    in_a_group(2, troubles, str(tmp_path))


def on_meshes(model):
    """Each layer on another mesh: a dimension of it, the other one, both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for name, where, placed in (("up", mesh["a"], [Shard(0)]), ("down", mesh["b"], [Shard(0)]), ("head", mesh, ONE)):
        weight = model.get_parameter(f"{name}.weight").detach()
        spread = distribute_tensor(weight, where, placed, src_data_rank=None)
        model.get_submodule(name).weight = nn.Parameter(spread)
    return model


def algebra(rank):
    held, model = sc.prune(net(), 0.5), on_meshes(net())
    theirs = sc.prune(model, 0.5)
    assert theirs.counts() == held.counts()
    up, down, head = (sc.Masks({name: theirs[name]}) for name in theirs)
    for both in (up & head, head & up, up & sc.Masks({"head.weight": held["head.weight"]})):
        assert both.counts() == {name: held.counts()[name] for name in both}
    with pytest.raises(InputError, match="prune them one by one"):
        up & down
    pruner = sc.Pruner(on_meshes(net()), {"up.weight": 0.5}, schedule=sc.linear(start=0, stop=2))
    for _ in range(2):
        pruner.step()
    assert pruner.finish().counts() == {"up.weight": 320, "down.weight": 0, "head.weight": 0}

    assert copy.deepcopy(theirs) == copy.copy(theirs) == theirs.to("cpu") == theirs
    other = {name: full(theirs[name]) for name in theirs}
    other["up.weight"][0, 0] ^= True  # in the part of two processes
    layouts = {name: (theirs[name].device_mesh, theirs[name].placements) for name in theirs}
    spread = {name: distribute_tensor(other[name], *layouts[name], src_data_rank=None) for name in other}
    assert theirs != sc.Masks(spread)
    with pytest.raises(MaskError, match="full_tensor"):
        assert theirs == held
    with pytest.raises(StateError, match=r"masks.save\(path\) in all"):
        pickle.dumps(theirs)


def test_masks_of_several_meshes_are_counted_once_and_equal_in_all_processes_or_in_none():
    in_a_group(4, algebra)


def another_name(rank):
    model = rows(net(), 2)
    held, before = sc.prune(net(), 0.5), full(model.up.weight)
    wrong = held if rank else held.named({"none.weight": "up.weight"})
    with pytest.raises(SecateurError, match=r"it has no none\.weight"):
        wrong.apply(model)
    assert torch.equal(full(model.up.weight), before)
    held.apply(model)
    assert sc.check(model, held) == {}


def test_masks_that_one_process_cannot_apply_none_applies():
    in_a_group(2, another_name)


def others(rank):
    """Each process has whole masks of its own: no mixture of them is applied."""
    model, theirs = rows(net(), 2), sc.prune(rows(net(), 2), 0.5)
    before = full(model.up.weight)
    mine = sc.prune(net(seed=rank), 0.5)
    for call in (
        lambda: mine.apply(model),
        lambda: sc.check(model, mine),
        lambda: sc.remask(model, mine),
        lambda: theirs & mine,
    ):
        with pytest.raises(InputError, match=r"process 1 has masks of down\.weight \d+ pruned .* alike in all"):
            call()
    scores = {name: weight.detach().abs() for name, weight in sc.weights(net(seed=rank)).items()}
    with pytest.raises(InputError, match=r"process 1 has down\.weight of scores with the checksum"):
        sc.prune(model, 0.5, score=scores)
    assert torch.equal(full(model.up.weight), before)
    wrong = mine if rank else sc.Masks({"up.weight": torch.ones(3, 3) > 0})
    with pytest.raises(SecateurError, match="of different models"):
        assert theirs & wrong


def test_whole_masks_that_differ_from_process_to_process_are_refused():
    in_a_group(2, others)
