"""secateur.sharding: where shards lie, and the selection over them, bit for bit that of the whole tensors."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial, _StridedShard

import secateur as sc
from processes import in_a_group
from secateur import selection, sharding
from secateur.errors import InputError
from secateur.scores import elementwise, magnitude
from secateur.streams import Stream
from secateur.support import bits
from secateur.support.process_groups import Grid

SHAPES = [(8, 6), (7, 5), (3, 4), (1, 9), (5, 3, 4), (11,)]


def placements(ndim, dims):
    """All placements on a mesh of `ndim` dimensions, of a tensor of `dims` dimensions."""
    one = [Replicate(), *(Shard(d) for d in range(dims))]
    yield from product(one, repeat=ndim)
    if ndim == 2:
        yield from ((_StridedShard(d, split_factor=2), Shard(d)) for d in range(dims))


def where_shards_lie(rank, ranks):
    meshes = [init_device_mesh("cpu", (ranks,)), *([init_device_mesh("cpu", (2, 2))] if ranks == 4 else [])]
    tried = 0
    for mesh, shape in product(meshes, SHAPES):
        for placed in placements(mesh.ndim, len(shape)):
            numel = math.prod(shape)
            values = torch.arange(numel).view(shape)
            try:
                tensor = distribute_tensor(values, mesh, placed, src_data_rank=None)
            except (RuntimeError, NotImplementedError):  # torch cannot place it so
                continue
            here = tensor.to_local().flatten().numpy()
            place = sharding.place_of("t", tensor)
            assert place.to_whole(np.arange(len(here))).tolist() == here.tolist()
            found, local = place.locate(np.arange(numel))
            assert found.nonzero()[0].tolist() == here.tolist()
            assert local.tolist() == list(range(len(here)))
            rows = here // math.prod(shape[1:])
            for row in range(shape[0]):
                assert [*place.row(row)] == (rows == row).nonzero()[0].tolist()
            assert not place.row(None)
            before = [int((here < index).sum()) for index in range(numel + 1)]
            assert [place.before(index) for index in range(numel + 1)] == before
            counted = torch.zeros(numel, dtype=torch.int64)
            if place.counts:
                counted[here] += 1
            distributed.all_reduce(counted)
            assert counted.tolist() == [1] * numel, (mesh.shape, placed, shape)
            tried += 1
    assert tried > 15


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_weight_lies_at_one_place_and_is_counted_once(ranks):
    in_a_group(ranks, where_shards_lie, ranks)


def drawn(generator, shape, kind, dtype):
    values = torch.randn(shape, generator=generator)
    if kind == "tied":
        values = (values * 3).round()
    if kind == "constant":
        values = torch.full(shape, 0.5)
    if kind == "zeros":
        values = values * (torch.rand(shape, generator=generator) < 0.3)
    return values.to(dtype)


def same_as_the_whole(rank, ranks, cases):
    meshes = [init_device_mesh("cpu", (ranks,)), *([init_device_mesh("cpu", (2, 2))] if ranks == 4 else [])]
    widest = meshes[-1]
    selection._SAMPLE, selection.WIDE = 64, 3  # so that the bracket and the digits are at work
    bits.CHUNK = 64
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for case in range(cases):
        kind = ("normal", "tied", "constant", "zeros")[case % 4]
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[case // 4 % 4]
        shapes = [(int(n), int(m)) for n, m in torch.randint(1, 24, (3, 2), generator=generator).tolist()]
        wholes = [drawn(generator, shape, kind, dtype) for shape in shapes]
        count = int(torch.randint(0, sum(w.numel() for w in wholes) + 1, (1,), generator=generator))
        streams = []
        for at, whole in enumerate(wholes):
            mesh = meshes[(case + at) % len(meshes)]
            every = list(placements(mesh.ndim, 2))
            placed = every[int(torch.randint(0, len(every), (1,), generator=generator))]
            plain = (case + at) % 7 == 6
            tensor = whole if plain else distribute_tensor(whole, mesh, placed, src_data_rank=None)
            place = sharding.place_of("t", tensor, widest)
            streams.append(Stream(f"t{at}", bits.local(tensor), magnitude, here=place.counts, place=place))
        cut = selection.threshold(streams, count, processes=Grid(widest))
        alone = [Stream(f"t{at}", whole, magnitude) for at, whole in enumerate(wholes)]
        want = selection.threshold(alone, count)
        assert cut == want
        for part, full in zip(streams, alone, strict=True):
            kept = bits.unpack(selection.keep(full, want)[0], full.values.numel())
            mine = bits.unpack(selection.keep(part, cut)[0], part.values.numel())
            assert torch.equal(mine, kept[torch.from_numpy(part.whole(np.arange(part.values.numel())))])
        tried += 1
    assert tried == cases


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_selection_over_shards_is_that_of_the_whole_tensors(ranks):
    in_a_group(ranks, same_as_the_whole, ranks, 40)


def bytes_of_a_selection(rank, ranks, million):
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(rank)
    part = torch.randn(million * 1_000_000 // ranks // 1000, 1000, generator=generator)
    tensor = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    place = sharding.place_of("t", tensor)
    sent = []

    class Counting(Grid):
        def total(self, array):
            sent.append(array.nbytes)
            return super().total(array)

    for values in (part, part.bfloat16()):
        sent.clear()
        stream = Stream("t", values, magnitude, here=place.counts, place=place)
        cut = selection.threshold([stream], million * 900_000, processes=Counting(mesh))
        lost = Grid(mesh).total(np.array([selection.keep(stream, cut)[1]]))
        assert lost.tolist() == [million * 900_000]
        assert sum(sent) < 70_000, sent


def test_the_bytes_that_are_sent_do_not_grow_with_the_weights():
    in_a_group(2, bytes_of_a_selection, 2, 1)
    in_a_group(2, bytes_of_a_selection, 2, 8)


def bytes_of_an_update(rank, ranks):
    """Of a hundred tensors, all that is added up, whatever asks for it."""
    mesh = init_device_mesh("cpu", (ranks,))
    sent, add_up = [], distributed.all_reduce

    def counting(tensor, **options):
        sent.append(tensor.nbytes)
        return add_up(tensor, **options)

    model = nn.Sequential(*(nn.Linear(64, 48, bias=False) for _ in range(100)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    distributed.all_reduce = counting
    for dtype in (torch.float32, torch.bfloat16):
        for allocation in ("global", "uniform", "erk"):
            sent.clear()
            sc.prune(model.to(dtype), 0.7, allocation=allocation)
            assert 10_000 < sum(sent) < 256 * 1024, (allocation, sum(sent))
            assert len(sent) < 40, (allocation, len(sent))
    distributed.all_reduce = add_up


def test_what_an_update_of_a_hundred_tensors_sends():
    in_a_group(2, bytes_of_an_update, 2)


def all_stop(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))

    @elementwise
    def score(name, weight):
        return torch.full_like(weight, math.nan) if rank == 1 else weight.abs()

    for values, given in ((torch.tensor([1.0, math.nan if rank == 1 else 2.0]), magnitude), (torch.rand(2), score)):
        tensor = DTensor.from_local(values, mesh, [Shard(0)], run_check=False)
        place = sharding.place_of("t", tensor)
        stream = Stream("t", values, given, here=place.counts, place=place)
        words = "holds" if rank == 1 else "process 1 of 2 stopped with NotFiniteError: .*holds"
        with pytest.raises(InputError, match=words):
            selection.threshold([stream], 1, processes=Grid(mesh))


def test_what_one_process_raises_each_one_raises():
    in_a_group(2, all_stop, 2)


def refused(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    tensor = DTensor.from_local(torch.rand(2, 2), mesh, [Partial()], run_check=False)
    with pytest.raises(InputError, match=r"fc\.weight holds sums that are not complete .*: redistribute it"):
        sharding.place_of("fc.weight", tensor)


def test_sums_that_are_not_complete_are_refused():
    in_a_group(2, refused, 2)


def test_cells_that_no_shard_cuts_have_a_place_among_all():
    place = sharding.Place((10, 7), (np.array([4, 5, 6, 7, 8, 9]), np.arange(7)))
    cells = place.cells((4, 3))
    assert cells.shape == (2, 2)
    assert [index.tolist() for index in cells.index] == [[1], [0, 1]]
    assert cells.to_whole(np.arange(2)).tolist() == [2, 3]
    assert sharding.Place((10, 7), (np.array([4, 5, 6, 8, 9]), np.arange(7))).cells((4, 3)) is None
    assert sharding.Place((10, 7), (np.array([2, 3, 4, 5]), np.arange(7))).cells((4, 3)) is None
    assert sharding.Place((10, 7), (np.array([8, 9]), np.arange(7))).cells((4, 3)).index[0].tolist() == []


def test_a_plain_tensor_has_no_place():
    assert sharding.place_of("t", torch.rand(3)) is None
    assert not bits.is_sharded(torch.rand(3))
    assert not bits.is_sharded("t")
