"""secateur.exchange: blocks of whole tensors from parts; all dtypes are in tests/storage/test_archive_sharded."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from processes import in_a_group
from secateur import sharding
from secateur.errors import InputError
from secateur.exchange import Exchange, part_of

SHAPES = [(8, 6), (7, 5), (3, 4), (1, 9), (5, 3, 4), (11,), (), (0, 3)]


def placements(mesh, dims):
    yield from product([Replicate(), *(Shard(d) for d in range(dims))], repeat=mesh.ndim)
    if mesh.ndim == 2:
        yield from ((_StridedShard(d, split_factor=2), Shard(d)) for d in range(dims))


def blocks(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 2) if ranks == 4 else (ranks,))
    wholes, state = {}, {"plain": torch.arange(5) + 100 * rank}
    for shape, placed in ((s, p) for s in SHAPES for p in placements(mesh, len(s))):
        values = torch.arange(np.prod(shape, dtype=int)).view(shape)
        try:
            state[f"{shape} {placed}"] = distribute_tensor(values, mesh, placed, src_data_rank=None)
        except (RuntimeError, NotImplementedError):  # torch cannot place it so
            continue
        wholes[f"{shape} {placed}"] = values.flatten()
    assert len(wholes) > 20
    wholes["plain"] = torch.arange(5)  # that of the first process
    spread = sharding.spread(state)
    sent, swap = [], spread.grid.swap

    def counting(given):
        sent.append(sum(part.size for at, part in enumerate(given) if at != rank))
        return swap(given)

    spread.grid.swap = counting
    exchange = Exchange({name: part_of(tensor) for name, tensor in state.items()}, spread)
    mine = list(wholes)[rank::ranks]

    def read():
        for name in mine:
            whole = wholes[name]
            for first in range(0, len(whole), 4):
                assert torch.equal(exchange.block(name, first, min(first + 4, len(whole))), whole[first : first + 4]), (
                    name
                )
        return len(mine)

    assert exchange.run(read) == len(mine)
    needed = sum(whole.nbytes for whole in wholes.values())
    every = spread.grid.total(np.array([sum(sent)]))
    assert every[0] <= needed


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_block_is_that_of_the_whole_tensor_and_goes_to_one_process_once(ranks):
    in_a_group(ranks, blocks, ranks)


def troubles(rank):
    mesh = init_device_mesh("cpu", (2,))
    state = {"a": distribute_tensor(torch.arange(12), mesh, [Shard(0)])}
    spread = sharding.spread(state)

    def wrong():
        if rank == 1:
            exchange.block("a", 0, 3)
            raise InputError("wrong: do right")
        for _ in range(50):  # goes on until it hears of it
            exchange.block("a", 0, 12)
            exchange.block("a", 0, 11)
        raise AssertionError

    exchange = Exchange({"a": part_of(state["a"])}, spread)
    with pytest.raises(
        InputError, match="^wrong: do right" if rank else "process 1 of 2 stopped with InputError: wrong: do"
    ):
        exchange.run(wrong)
    part = part_of(state["a"])

    def unread(start, stop):
        raise MemoryError("full")

    exchange = Exchange({"a": part._replace(read=unread) if rank else part}, spread)
    with pytest.raises(MemoryError if rank else InputError, match="full"):
        exchange.run(lambda: None if rank else exchange.block("a", 0, 12))
    lacking = {"a": DTensor.from_local(torch.arange(5), mesh, [Shard(0)], run_check=False, shape=(12,), stride=(1,))}
    exchange = Exchange({"a": part_of(lacking["a"])}, sharding.spread(lacking))
    with pytest.raises(Exception, match="process"):
        exchange.run(lambda: exchange.block("a", 0, 12))
    distributed.barrier()


def test_what_one_process_raises_all_raise():
    in_a_group(2, troubles)
