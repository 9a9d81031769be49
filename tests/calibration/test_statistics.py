"""Statistics as data: merged, added up over processes, written and read."""

import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import secateur as sc
from secateur.calibration.statistics import Statistics
from secateur.errors import FileError, InputError, InputTypeError


class Net(nn.Module):
    """Two layers that read one input, a convolution with groups, and an LSTM."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x, scale=1.0):
        x = self.conv((self.a(x) * scale + self.b(x)).mT).mT
        return self.lstm(x)[0]


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, turned=False):
        return self.a(x) + self.b(x.flip(-1) if turned else x)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 7, 6, generator=generator) for _ in range(count)]


def same(one, other, exact=True):
    assert [m.pieces for m in one.moments] == [m.pieces for m in other.moments]
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    for mine, theirs in zip(one.moments, other.moments, strict=True):
        torch.testing.assert_close(mine.gram, theirs.gram, **tolerance)
        assert torch.equal(mine.count, theirs.count)


def loss(model, batch):
    return model(batch).square().mean()


def test_several_workers_see_what_one_would_have_seen():
    model, data = Net(), batches(8)
    parts = [sc.calibrate(model, data[:4], loss=loss), sc.calibrate(model, data[4:], loss=loss)]
    whole = sc.calibrate(model, [*data[:4], data[0], *data[4:]], loss=loss)  # the fifth is held out
    merged = parts[0].merge(parts[1])
    same(merged, whole, exact=False)
    assert merged.of("a.weight")[0].gram is merged.of("b.weight")[0].gram
    assert [x is y for x, y in zip(merged.kept, data, strict=True)] == [True] * 8
    torch.testing.assert_close(merged.gradients, whole.gradients)
    assert [len(runs) for runs in merged.runs.values()] == [8]


def test_what_one_worker_saw_shared_and_another_apart_is_apart():
    model, data = Feed(), batches(2)
    shared, apart = sc.calibrate(model, data[:1]), sc.calibrate(model, [(data[1], True)])
    before = shared.moments[0].gram.clone()
    a, b = shared.merge(apart).moments
    assert a.gram is not b.gram
    torch.testing.assert_close(a.gram, shared.moments[0].gram + apart.moments[0].gram)
    torch.testing.assert_close(b.gram, shared.moments[1].gram + apart.moments[1].gram)
    assert torch.equal(before, shared.moments[0].gram)


def test_merging_what_does_not_belong_together():
    stats = sc.calibrate(Feed(), batches(1))
    with pytest.raises(InputTypeError, match=r"other is 3: give what sc\.calibrate gave"):
        stats.merge(3)
    with pytest.raises(InputError, match=r"another model: b\.weight .* is not there in the others"):
        stats.merge(narrow())
    with pytest.raises(InputError, match="give both the same loss"):
        stats.merge(sc.calibrate(Feed(), batches(1), loss=loss))


def narrow():
    model = Feed()
    return sc.calibrate(model, batches(1), scope=sc.weights(model, only="a"))


def test_a_file_holds_all_of_it(tmp_path):
    model, data = Net(), [(x, 0.5) for x in batches(6)]
    stats = sc.calibrate(model, data, loss=lambda model, batch: loss(lambda x: model(*x), batch))
    stats.save(tmp_path / "stats.safetensors")
    found = Statistics.load(tmp_path / "stats.safetensors")
    same(found, stats)
    assert found.of("a.weight")[0].gram is found.of("b.weight")[0].gram
    assert found.shapes == stats.shapes
    assert found.kept == []
    ((x, scale),) = found.held
    assert torch.equal(x, data[4][0])
    assert scale == 0.5
    for mine, theirs in zip(found.runs["lstm"], stats.runs["lstm"], strict=True):
        assert torch.equal(mine.input, theirs.input)
        assert torch.equal(mine.lengths, theirs.lengths)
        assert mine.state == theirs.state == ()
    assert all(torch.equal(total, stats.gradients[name]) for name, total in found.gradients.items())
    assert str(found) == str(stats)
    found.require(model)


def test_shared_sums_are_written_once(tmp_path):
    model = Feed()
    sc.calibrate(model, batches(1)).save(tmp_path / "both")
    sc.calibrate(model, batches(1), scope=sc.weights(model, only="a")).save(tmp_path / "one")
    both, one = (tmp_path / name for name in ("both", "one"))
    assert both.stat().st_size - one.stat().st_size < 6 * 6 * 8


def test_batches_of_packed_sequences_are_written(tmp_path):
    packed = pack_sequence([torch.randn(n, 6) for n in (5, 7, 2)], enforce_sorted=False)
    sc.calibrate(nn.LSTM(6, 3), [packed]).save(tmp_path / "s")
    (found,) = Statistics.load(tmp_path / "s").kept
    assert torch.equal(found.data, packed.data)


def test_batches_that_no_file_holds(tmp_path):
    stats = Statistics((), {}, held=[{"x": object()}])
    with pytest.raises(InputError, match=r"a batch that is held out holds an object, .*give batches of tensors"):
        stats.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_files_of_something_else(tmp_path):
    stats = sc.calibrate(Feed(), batches(1))
    path = tmp_path / "s"
    stats.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(FileError, match=r"cannot be read as secateur\.statistics .*make it again"):
        Statistics.load(path)
    sc.prune(Feed(), 0.5).save(path)
    with pytest.raises(FileError, match=r"is no file of secateur\.statistics, version 1: give one"):
        Statistics.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Statistics.load(tmp_path / "none")


def edited(path, change):
    """Write the file again with other contents."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    contents = json.loads(metadata["contents"])
    change(contents)
    save_file(tensors, path, {**metadata, "contents": json.dumps(contents)})


def of_run(key, value):
    return lambda contents: contents["runs"]["dict"]["lstm"]["list"][0]["dict"].update({key: value})


def of_sums(at, value):
    return lambda contents: contents["moments"]["list"][0]["list"].__setitem__(at, value)


@pytest.mark.parametrize("change", [
    lambda contents: contents.update(held=None),
    lambda contents: contents.update(kept=3),
    lambda contents: contents["held"]["list"].append("x"),
    of_sums(0, {"list": [{"list": ["a.weight", 0, None]}]}),
    of_sums(0, {"list": [{"list": ["a.weight", 0, 999]}]}),
    of_sums(1, {"tensor": 1}),
    of_sums(1, None),
    of_sums(2, {"tensor": 0}),
    of_run("input", "x"),
    of_run("lengths", None),
    of_run("state", "x"),
])  # fmt: skip
def test_a_file_that_was_edited(tmp_path, change):
    path = tmp_path / "stats.safetensors"
    sc.calibrate(Net(), [(x, 0.5) for x in batches(6)]).save(path)
    Statistics.load(path)
    edited(path, change)
    with pytest.raises(FileError, match=r"damaged .*calibrate again"):
        Statistics.load(path)


def test_what_was_read_is_laid_as_what_was_made(tmp_path):
    path = tmp_path / "stats.safetensors"
    sc.calibrate(Feed(), batches(6)).save(path)
    assert all(one.gram.data_ptr() % 64 == 0 for one in Statistics.load(path).moments)


class Workers:
    """Threads that add up tensors as processes do."""

    def __init__(self, count):
        self.barrier, self.box = threading.Barrier(count, timeout=20), {}

    def all_reduce(self, rank, tensor):
        self.box[rank] = tensor
        self.barrier.wait()
        total = torch.stack([self.box[r] for r in sorted(self.box)]).sum(0)
        self.barrier.wait()
        return total

    def run(self, work):
        found = {}

        def one(rank):
            try:
                found[rank] = work(rank, lambda tensor: self.all_reduce(rank, tensor))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.barrier.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in sorted(found)]


def test_sums_of_all_processes():
    model, data = Feed(), batches(4)
    mine = [sc.calibrate(model, data[:1], loss=loss), sc.calibrate(model, data[1:], loss=loss)]
    found = Workers(2).run(lambda rank, add: mine[rank].reduced(add))
    wanted = sc.calibrate(model, data, loss=loss)
    for one in found:
        same(one, wanted, exact=False)
        assert one.moments[0].gram is one.moments[1].gram
        torch.testing.assert_close(one.gradients, wanted.gradients)
    assert [len(one.kept) for one in found] == [1, 3]
    assert mine[0].moments[0].count.tolist() == [56]  # its own are as they were


def test_processes_that_saw_different_things_stop_together():
    model, data = Feed(), batches(2)
    mine = [sc.calibrate(model, data[:1]), sc.calibrate(model, [(data[1], True)])]
    found = Workers(2).run(lambda rank, add: mine[rank].reduced(add))
    for error in found:
        with pytest.raises(InputError, match=r"read in another way.*merge them in one"):
            raise error


def test_runs_are_not_summed():
    with pytest.raises(InputError, match=r"lstm keeps its inputs whole.* merge them in one"):
        sc.calibrate(Net(), batches(1)).reduced(lambda t: t)


def test_matrices_of_the_same_tensors_are_told_apart():
    text = str(sc.calibrate(nn.GRU(6, 8), [torch.randn(5, 16, 6)]))
    assert "weight_ih_l0[0:16] + weight_hh_l0[0:16] " in text
    assert "weight_ih_l0[16:24] + weight_hh_l0[16:24] " in text
