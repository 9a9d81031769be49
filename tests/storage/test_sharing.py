"""secateur.storage.sharing: which process writes which shard; the whole is tried in test_pruning and test_archive."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed

from processes import in_a_group
from secateur.errors import WriteError
from secateur.storage.checkpoints import Checkpoint, opened
from secateur.storage.sharing import mine, shared_folder
from secateur.support.process_groups import ALONE, Group


class OneOf:
    """A process among several that are not there."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def checkpoint(folder, sizes):
    shards = []
    for number, size in enumerate(sizes):
        save_file({f"w{number}": torch.zeros(size)}, folder / f"{number}.safetensors")
        shards += opened(folder / f"{number}.safetensors").shards
    return Checkpoint(folder, tuple(shards), {})


def test_each_shard_is_of_one_process_and_the_load_is_even(tmp_path):
    whole = checkpoint(tmp_path, [10, 100, 60, 50])
    shares = [[shard.file.stem for shard in mine(whole, OneOf(rank, 2))] for rank in range(2)]
    assert shares == [["1", "0"], ["2", "3"]]
    assert [shard.file.stem for shard in mine(whole, ALONE)] == ["1", "2", "3", "0"]
    assert mine(whole, OneOf(5, 6)) == []


def test_one_process_has_the_folder_for_itself(tmp_path):
    with shared_folder(tmp_path / "out", ALONE) as unfinished:
        (unfinished / "a").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "new"


def one_fails(rank, folder):
    out = Path(folder, "out")
    with shared_folder(out, Group()) as unfinished:
        (unfinished / str(rank)).touch()
    assert sorted(path.name for path in out.iterdir()) == ["0", "1"]
    distributed.barrier()
    for wrong in range(2):
        stopped = "" if rank == wrong else f"process {wrong} of 2 stopped with WriteError: "
        with pytest.raises(WriteError, match=f"^{stopped}.*out was not written .No space left on device.*see to room"):
            failing(out, rank == wrong)
        distributed.barrier()
        assert sorted(path.name for path in out.iterdir()) == ["0", "1"]
    stopped = "process 0 of 2 stopped with WriteError: " * rank
    with pytest.raises(WriteError, match=f"^{stopped}.*holds .*, which would be lost: give a new folder"):
        failing(out, False)


def failing(folder, fails):
    with shared_folder(folder, Group()):
        if fails:
            raise OSError(28, "No space left on device")


def test_what_one_process_raises_all_raise(tmp_path):
    in_a_group(2, one_fails, str(tmp_path))
