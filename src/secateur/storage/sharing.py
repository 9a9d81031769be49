"""How several processes share a checkpoint: which files are whose, one folder for all, tensors that lie in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.exchange import BLOCK, Exchange
from secateur.sharding import Spread, layout
from secateur.storage.checkpoints import Checkpoint, Shard
from secateur.storage.stored import Alias, Stored, parts
from secateur.support.files import refusals, replacing_folder
from secateur.support.process_groups import Processes, shared


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


@contextmanager
def shared_folder(target: Path, processes: Processes) -> Iterator[Path]:
    """As `replacing_folder`, for all processes together.

    Raises:
        WriteError: as `replacing_folder`; a process does not see the folder that the first one makes.
    """
    with shared(replacing_folder(target), processes, seen=True) as temporary, refusals(target):
        yield temporary


class Apart(Stored):
    """A tensor of which several processes hold parts, read inside of `Exchange.run`.

    Each number goes to the process that writes it once; twice in a tensor of several blocks that packing does not make
    smaller, as the writer reads that one again.
    """

    def __init__(self, name: str, dtype: torch.dtype, shape: torch.Size, exchange: Exchange) -> None:
        super().__init__(name, dtype, shape)
        self._exchange = exchange

    def pieces(self, count: int) -> Iterator[Tensor]:
        step = max(count, BLOCK)
        for first in range(0, self.numel(), step):
            yield from parts(self._exchange.block(self.name, first, min(first + step, self.numel())), count)


def stored_apart(
    state: Mapping[str, Tensor], here: Sequence[Stored], spread: Spread, exchange: Exchange
) -> list[Stored]:
    """The tensors of a state_dict that is spread over processes; tied ones as aliases of the first.

    Args:
        state: with DTensors; the same names in all processes.
        here: what `stored_of` says of the parts that are here, in the order of the state.
        spread: of the state.
        exchange: of the same tensors.
    """
    numbers = {name: number for number, name in enumerate(state)}
    found: list[Stored] = []
    # a process that holds nothing of a tensor cannot tell whether it is tied: the others say so
    firsts = [numbers[one.of.name if isinstance(one, Alias) else one.name] if one.numel() else None for one in here]
    said = [(first, first**2, 1) if first is not None else (0, 0, 0) for first in firsts]
    for (name, tensor), (sums, squares, many) in zip(state.items(), spread.grid.total(np.array(said)), strict=True):
        agreed = sums < many * len(found) and sums**2 == many * squares
        first = found[sums // many] if agreed and _whole_alike(state[found[sums // many].name], tensor) else None
        found.append(Apart(name, tensor.dtype, tensor.shape, exchange) if first is None else Alias(name, first))
    return found


def _whole_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of which the parts here are the same numbers are the same as a whole."""
    return one.shape == other.shape and layout(one) == layout(other)
