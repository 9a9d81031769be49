"""secateur.storage.archive on sharded models: the bytes of one process; what one process raises, all raise."""

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import secateur as sc
from processes import as_torchrun, in_a_group, joined
from secateur.errors import GroupError, SecateurError, WriteError
from secateur.storage import archive, coding, reading, sharing, writing
from secateur.storage.dtypes import KINDS
from sharded_models import LAYOUTS, rows

LEVELS = ({}, {"effort": "fast", "level": "bf16"}, {"step": 0.1})


class Net(nn.Module):
    """Uneven rows, buffers that differ between processes, a tie, a weight that no process holds much of."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 37)
        self.norm = nn.BatchNorm1d(37)
        self.head, self.again = nn.Linear(37, 5, bias=False), nn.Linear(37, 5, bias=False)
        self.again.weight = self.head.weight
        self.one = nn.Parameter(torch.randn(1, 300))

    def forward(self, x):
        x = self.norm(self.down(torch.tanh(self.up(x))))
        return self.head(x) + self.again(x) + self.one.sum()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    sc.prune(model, 0.8)
    return model


def same_files(one, other):
    files = [sorted(p.relative_to(place) for p in place.rglob("*") if p.is_file()) for place in (one, other)]
    assert files[0] == files[1]
    for file in files[0] or [Path()]:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def part(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout_of(sharded, whole):
    """The parts of whole tensors that lie here, as those of a sharded model do."""
    return {
        name: part(distribute_tensor(whole[name], t.device_mesh, t.placements, src_data_rank=None))
        if isinstance(t, DTensor)
        else whole[name]
        for name, t in sharded.state_dict().items()
    }


def same_bytes(rank, ranks, folder):
    writing.BLOCK = reading.BLOCK = sharing.BLOCK = 1024  # so that tensors have several blocks
    folder = Path(folder)
    for at, layout in enumerate(LAYOUTS[ranks]):
        for level, options in enumerate((LEVELS[0], LEVELS[1 + at % 2])):
            whole = net((torch.float32, torch.bfloat16)[(at + level) % 2])
            sharded = layout(copy.deepcopy(whole), ranks)
            with torch.no_grad():
                sharded.eval()(torch.ones(2, 48, dtype=whole.up.weight.dtype))  # the root keeps whole copies now
                sharded.norm.running_mean += rank  # the first one's counts
            for name, more in (("m.safetensors", {}), ("set", {"max_file_bytes": 6000})):
                place = folder / f"{layout.__name__}{level}{name}"
                written = sc.save(sharded, place, **options, **more)
                alone = folder / f"alone{rank}{at}{level}{name}"
                want = sc.save(whole, alone, **options, **more)
                same_files(alone, place)
                assert written.to_dict() == {**want.to_dict(), "path": str(place)}
                assert "step" not in options or any(tensor.error for tensor in written.tensors)
                found = sc.load(place, verify=True)
                assert list(found) == list(whole.state_dict())
                assert found["again.weight"] is found["head.weight"]
                fresh = layout(Net().to(whole.up.weight.dtype), ranks)
                if rank == 1:  # alone: it waits for nobody
                    sc.load(place, into=fresh)
                    mine, theirs = fresh.state_dict(), layout_of(sharded, found)
                    assert all(torch.equal(part(mine[name]), theirs[name]) for name in found)
            assert len(list(place.iterdir())) > 3
            distributed.barrier()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_are_those_of_one_process(tmp_path, ranks):
    in_a_group(ranks, same_bytes, ranks, str(tmp_path))


def all_dtypes(rank, folder):
    """Each dtype and layout of a state_dict, most of them too random to be packed, on a mesh of two."""
    half = rank // 2  # the other half saves another model meanwhile
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("halves", "parts"))["parts"]
    generator = torch.Generator().manual_seed(half)
    whole, spread = {}, {}
    for at, (dtype, kind) in enumerate(KINDS.items()):
        for shape in ((7, 3, 50), (1, 9), (0, 4), ()):
            bytes_ = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, kind.itemsize), generator=generator)
            value = bytes_.to(torch.uint8).view(dtype).view(shape)
            name = f"{dtype}{list(shape)}"
            whole[name] = value
            placed = (Shard(at % 2) if shape else Replicate(),)
            words = bytes_.to(torch.uint8)  # torch deals out few dtypes
            part = distribute_tensor(words, mesh, placed, src_data_rank=None).to_local().contiguous()
            part = part.view(dtype).view(part.shape[:-1])
            if at % 3 == 1 and part.ndim > 1:
                part = part.transpose(0, 1).contiguous().transpose(0, 1)
            stride = value.stride()
            spread[name] = DTensor.from_local(part, mesh, placed, run_check=False, shape=value.shape, stride=stride)
    spread["conjugate"] = spread["torch.complex64[7, 3, 50]"].conj()
    whole["conjugate"] = whole["torch.complex64[7, 3, 50]"].conj()
    spread["again"], whole["again"] = (s["torch.float16[7, 3, 50]"] for s in (spread, whole))
    spread["plain"] = whole["plain"] = torch.arange(3.0)
    for options in ({}, {"max_file_bytes": 20_000}):
        place, alone = (
            Path(folder, f"{half}{len(options)}.safetensors"),
            Path(folder, f"a{rank}{len(options)}.safetensors"),
        )
        if options:
            place, alone = place.with_suffix(""), alone.with_suffix("")
        sc.save(spread, place, **options)
        sc.save(whole, alone, **options)
        same_files(alone, place)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_all_dtypes_and_a_mesh_that_is_not_all_processes(tmp_path):
    in_a_group(4, all_dtypes, str(tmp_path))


def troubles(rank, ranks, folder):
    folder = Path(folder)
    sharded = rows(net(), ranks)
    old, many = folder / "m.safetensors", folder / "set"
    sc.save(sharded, old)
    sc.save(sharded, many, max_file_bytes=6000)
    before = {file: file.read_bytes() for file in (old, *many.iterdir())}
    distributed.barrier()

    def refused(*words, kind=SecateurError, path=old, **options):
        """Words for each process, or for all."""
        with pytest.raises(kind, match=words[rank % len(words)]):
            sc.save(sharded, path, **options)
        distributed.barrier()
        assert {file: file.read_bytes() for file in (old, *many.iterdir())} == before
        assert not list(folder.glob(".*"))
        distributed.barrier()

    refused("process 1 has path .*other.*call it alike", path=folder / "other.safetensors" if rank else old)
    refused("process 1 has effort fast, process 0 has best.*call it alike", effort="fast" if rank else "best")
    bad = "no level named 'x': choose"
    refused(f"process 1 stopped with InputError: {bad}", bad, level="x" if rank else "fp16")
    bad = "give a name that ends in it"
    refused(f"process 1 stopped with InputError: .*{bad}", bad, path="m.pt" if rank else old)
    refused("so give its name", path=old, max_file_bytes=6000)
    refused("give a whole number of bytes", path=many, max_file_bytes=0.5)
    lost = ".*which would be lost: give a new folder"
    refused(lost, f"process 0 of 2 stopped with WriteError: {lost}", kind=WriteError, path=many, max_file_bytes=10**9)
    place = folder / "no" / "m.safetensors"
    refused("make its folder first", "process 0 of 2 stopped with WriteError: .*make", kind=WriteError, path=place)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    coded = coding.encode
    for one, path in ((0, old), (0, many), (1, many)):
        coding.encode = full if rank == one else coded
        words = [f"process {one} of 2 stopped with WriteError: .*No space left on device"] * 2
        words[one] = (
            rf"{path.name} was not written \(No space left on device\), and what was there is intact: see to room"
        )
        refused(*words, kind=WriteError, path=path, max_file_bytes=None if path == old else 6000)
    coding.encode = coded

    def unreadable(tensor):
        part = part_of(tensor)
        return part._replace(read=full) if rank == 1 and tensor.shape == (64, 48) else part

    part_of, archive.part_of = archive.part_of, unreadable
    refused("process 1 of 2 stopped with OSError: .*No space", "No space", kind=Exception)
    archive.part_of = part_of
    sc.save(sharded, old)
    assert old.read_bytes() == before[old]


def test_what_one_process_raises_all_raise(tmp_path):
    in_a_group(2, troubles, 2, str(tmp_path))


def killed(rank, folder, when):
    sharded, many = rows(net(), 2), Path(folder) / "set"
    if not many.exists():
        sc.save(sharded, many, max_file_bytes=6000)
    before = {file: file.read_bytes() for file in many.iterdir()}
    distributed.barrier()

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == when[0]:
        setattr(coding if when[1] == "encode" else archive, when[1], kill)
    try:
        sc.save(sharded, many, max_file_bytes=6000)
    except GroupError as error:
        assert {file: file.read_bytes() for file in many.iterdir()} == before
        print(error)


@pytest.mark.parametrize("when", [(1, "encode"), (0, "encode"), (1, "write_packed"), (0, "_write_index")])
def test_what_a_killed_process_leaves(tmp_path, when):
    said = as_torchrun(2, joined, killed, str(tmp_path), when)
    assert said[when[0]].returncode == -signal.SIGKILL
    assert "a process was lost, or did not make the same call, while the model was saved" in said[1 - when[0]].stdout
    before = {file: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    sc.save(net(), tmp_path / "set", max_file_bytes=6000)
    assert {file: file.read_bytes() for file in (tmp_path / "set").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
