"""Tuning times layers where they stand, twice, and remembers; no test here depends on how fast anything is."""

import pytest
import torch
from torch import nn

from secateur.runtime import products, tuning
from sparse_models import fake_times, sparse, thin


class Twice(nn.Module):
    """One layer called with two numbers of rows, one never called."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(16, 16)
        self.idle = nn.Linear(16, 16)

    def forward(self, x):
        return self.used(self.used(x)[:1])


CALL = ((torch.randn(8, 16),), {})


@pytest.fixture
def recorded(backend, monkeypatch):
    monkeypatch.setattr(tuning, "_CACHE_BYTES", 64)
    model = sparse(thin(Twice()))
    layers = {"used": model.used, "idle": model.idle}
    with tuning.recording(layers) as recorders, torch.inference_mode():
        yield model, recorders


def test_look_finds_layers_and_their_rows(recorded):
    model, recorders = recorded
    assert tuning.look(model, recorders, CALL) == {"used": {0, 3}}


def test_times_both_kernels_for_each_row_class(recorded):
    model, recorders = recorded
    (given,) = tuning.groups(model, recorders, CALL, {("used", 0), ("used", 3)})
    found = tuning.times(model, given)
    assert set(found) == {("used", 0), ("used", 3)}
    assert all(0 < seconds < 1 for pair in found.values() for seconds in pair)


def test_each_layer_is_first_in_as_many_passes_of_each_mode(recorded, monkeypatch):
    model, recorders = recorded
    (given,) = tuning.groups(model, recorders, CALL, {("used", 0), ("used", 3)})
    replay, firsts = tuning._replay, []
    monkeypatch.setattr(
        tuning, "_replay", lambda some, mode: (firsts.append((some[0][1][0].shape[0], mode)), replay(some, mode))
    )
    monkeypatch.setattr(tuning, "_ROUNDS", range(4, 4))
    tuning.times(model, given)
    passes = firsts[2:]  # the first of each mode is not counted
    assert {one: passes.count(one) for one in passes} == dict.fromkeys(
        [(8, "dense"), (8, "sparse"), (1, "dense"), (1, "sparse")], 4
    )


def test_slow_layers_are_timed_apart(recorded, monkeypatch):
    model, recorders = recorded
    both = {("used", 0), ("used", 3)}
    rows = [[one[1][0].shape[0] for one in group] for group in tuning.groups(model, recorders, CALL, both)]
    assert rows == [[8, 1]]
    monkeypatch.setattr(tuning, "_TOGETHER", 0.0)
    rows = [[one[1][0].shape[0] for one in group] for group in tuning.groups(model, recorders, CALL, both)]
    assert rows == [[8], [1]]
    (group,) = tuning.groups(model, recorders, CALL, {("used", 0)})
    assert [one[1][0].shape[0] for one in group] == [1]
    assert not any(recorder.seconds or recorder.inputs for recorder in recorders)


def test_dense_and_sparse_are_what_they_say(recorded):
    model, recorders = recorded
    model.used.packed_weight = products.pack(torch.zeros(16, 16))
    model.used.bias.zero_()
    for mode, zero in (("dense", False), ("sparse", True)):
        recorders[0].mode = mode
        assert bool(model.used(CALL[0][0]).any()) is not zero


def test_recorders_go(backend):
    model = sparse(thin(Twice()))
    with pytest.raises(ZeroDivisionError, match="mine"), tuning.recording({"used": model.used}):
        raise ZeroDivisionError("mine")
    assert "forward" not in vars(model.used)
    assert model.used._choices == 0


def choose(model, recorders):
    seen = tuning.look(model, recorders, CALL)
    found = {}
    for name, timing in tuning.choose(model, recorders, CALL, seen, {"used": "a", "idle": "b"}):
        found.setdefault(name, []).append(timing)
    return {name: sorted(timings, key=lambda timing: timing.bucket) for name, timings in found.items()}


def test_a_gain_must_be_seen_twice_with_a_margin(recorded, monkeypatch):
    model, recorders = recorded
    runs = iter([{0: 1.2, 3: 1.2}, {0: 1.0, 3: 1.2}])

    def measured(*_):
        return {("used", bucket): (gain, 1.0) for bucket, gain in next(runs).items()}

    monkeypatch.setattr(tuning, "times", measured)
    assert {t.bucket: t.sparse for t in choose(model, recorders)["used"]} == {0: False, 3: True}


def test_what_never_looks_faster_is_measured_once(recorded, monkeypatch):
    model, recorders = recorded
    count = []
    fake_times(monkeypatch, lambda name, bucket: count.append(name) or (1.04, 1.0))
    assert not any(t.sparse for t in choose(model, recorders)["used"])
    assert len(count) == 2  # one for each row class


def test_what_was_measured_is_remembered(recorded, monkeypatch):
    model, recorders = recorded
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0))
    first = choose(model, recorders)
    monkeypatch.setattr(tuning, "times", None)
    assert choose(model, recorders) == first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(TypeError, match="not callable"):  # measures anew, for another number of threads
            choose(model, recorders)
    finally:
        torch.set_num_threads(threads)


def test_patterns_are_of_zeros_alone():
    one = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert tuning.pattern([one]) == tuning.pattern([one * 5]) != tuning.pattern([one.flip(0)])
    assert tuning.pattern([torch.zeros(2, 8)]) != tuning.pattern([torch.zeros(8, 2)])


def test_gain_is_measured_in_evaluation_mode_and_puts_flags_back(monkeypatch):
    monkeypatch.setattr(tuning, "_GAIN", ((0.001, 6),))
    plain, fast = nn.Linear(4, 4).train(), nn.Linear(4, 4).eval()
    gain = tuning.gain(plain, fast, ((torch.zeros(1, 4),), {}))
    assert gain.least <= gain.speedup <= gain.most
    assert plain.training
    assert not fast.training


@pytest.mark.parametrize(("plain", "looks"), [([3.0, 3.1, 2.9], 1), ([0.9, 1.0, 0.9], 1), ([1.0, 1.4, 1.1], 2)])
def test_a_gain_that_is_clear_from_three_blocks_needs_no_more(monkeypatch, plain, looks):
    asked = []

    def blocks(models, call, seconds, fewest):
        asked.append(fewest)
        return {"plain": plain * (fewest // 3), "fast": [1.0] * fewest}, {}

    monkeypatch.setattr(tuning, "time_blocks", blocks)
    gain = tuning.gain(nn.Linear(4, 4), nn.Linear(4, 4), CALL)
    assert asked == [3, 6][:looks]
    assert gain.clear == (looks == 1)
    assert gain.faster == (plain[0] == 3.0)


def test_cpu_has_a_name():
    assert tuning.cpu()
