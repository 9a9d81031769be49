"""How several processes share a checkpoint: which files are whose, and one folder into which all of them write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from secateur.storage.checkpoints import Checkpoint, Shard
from secateur.support.files import replacing_folder
from secateur.support.process_groups import Processes


def mine(checkpoint: Checkpoint, processes: Processes) -> list[Shard]:
    """Return the shards that this process reads and writes: the largest first, each to the process with least."""
    load = [0] * processes.size
    own = []
    for shard in sorted(checkpoint.shards, key=lambda shard: -sum(t.nbytes for t in shard.tensors)):
        least = load.index(min(load))
        load[least] += sum(tensor.nbytes for tensor in shard.tensors)
        if least == processes.rank:
            own.append(shard)
    return own


def wait(processes: Processes) -> None:
    """Return when all processes have come here."""
    processes.total(np.zeros(1))


@contextmanager
def shared_folder(target: Path, processes: Processes) -> Iterator[Path]:
    """As `replacing_folder`, for all processes together: the first one makes the folder, and gives it its name.

    Raises:
        WriteError: as `replacing_folder`.
    """
    if processes.rank == 0:
        with replacing_folder(target) as temporary:
            processes.from_first(str(temporary))
            yield temporary
            wait(processes)
    else:
        yield Path(processes.from_first(""))
        wait(processes)
    wait(processes)
