"""secateur.masks of sharded models: files of the bytes that masks of the whole weights give."""

from pathlib import Path

import pytest
import torch
from torch import distributed

import secateur as sc
from processes import in_a_group
from secateur import masks
from secateur.errors import InputError, WriteError
from sharded_models import LAYOUTS, net, rows


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


@pytest.mark.parametrize("ranks", [2, 4])
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
