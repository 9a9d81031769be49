"""A27, A52, A59: denormals are told, timing is honest, and the first call is no reported time."""

import copy
import time

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measurement.timing import compare, measure


class Sleeper(nn.Module):
    """Takes so many seconds a call, and more at the first."""

    def __init__(self, seconds, first=0.0):
        super().__init__()
        self.seconds, self.first = seconds, first

    def forward(self, x):
        time.sleep(self.seconds + self.first)
        self.first = 0.0
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a27_no_denormals_after_finish_if_one_asks(dtype):
    model = nn.Linear(20, 20, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    with torch.no_grad():
        model.weight[:2] = tiny / 4
        model.weight[2] = -tiny / 4
    pruner = sc.Pruner(model, 0.5, score=lambda name, w: torch.arange(w.numel()).flip(0).view(w.shape).float())
    pruner.step()
    kept = pruner.masks["weight"]
    before = model.weight.detach().clone()
    masks = pruner.finish(lift_denormals=True)
    real = torch.view_as_real(model.weight.detach()) if dtype.is_complex else model.weight.detach()
    assert not bool(((real != 0) & (real.abs() < tiny)).any())
    assert masks.pruned == 200 == int((model.weight == 0).sum())
    assert bool((model.weight[:2].real == tiny).all())
    assert bool((model.weight[2].real == -tiny).all())
    assert torch.equal(model.weight[3:][kept[3:]], before[3:][kept[3:]])


def test_a27_denormals_are_counted_and_their_time_is_refused():
    dense = nn.LSTM(8, 16)
    decayed = copy.deepcopy(dense)
    with torch.no_grad():
        decayed.weight_hh_l0[:5] = 1e-39  # 5 x 16 weights
    result = compare({"dense": dense, "decayed": decayed}, torch.ones(4, 2, 8), threads=1, seconds=0.01)
    assert result.measurements["decayed"].denormals == 80
    assert result.verdict("decayed") == "no verdict"
    told = result.table().text(width=None)
    assert "80 weights are subnormal" in told
    assert "set_flush_denormal(True)" in told
    assert result.to_dict()["measurements"]["decayed"]["trusted"] is False


def test_a52_a_real_difference_is_seen_and_its_size_too():
    models = {"slow": Sleeper(0.03), "fast": Sleeper(0.001)}
    result = compare(models, torch.ones(1), threads=1, seconds=0.3)
    assert result.verdict("fast").endswith("x faster")
    assert result.speedup("fast")[0] > 2
    swapped = compare(dict(reversed(models.items())), torch.ones(1), threads=1, seconds=0.3)
    assert swapped.verdict("slow").endswith("x slower")


def test_a52_no_difference_if_the_intervals_overlap():
    model = nn.LSTM(8, 16)
    result = compare({"a": model, "b": model}, torch.ones(4, 2, 8), threads=1, seconds=0.05)
    a, b = (result.measurements[name].interval_seconds for name in "ab")
    if max(a[0], b[0]) <= min(a[1], b[1]):  # as they nearly always do for one and the same model
        assert result.verdict("b") in ("no difference", "cannot tell")


def test_a52_the_table_says_how_it_was_timed():
    text = str(compare({"a": nn.LSTM(8, 16)}, torch.ones(4, 2, 8), threads=1, seconds=0.01))
    for part in ("95 % interval", "quartiles", "threads", "float32", "cpu", "denormal", "first call (apart)"):
        assert part in text


def test_a59_the_first_call_is_in_no_reported_time():
    got = measure(Sleeper(0.0, first=0.5), torch.ones(1), threads=1, seconds=0.01)
    assert got.first_call_seconds >= 0.5
    assert max(got.quartile_seconds) < 0.1
    lstm = measure(nn.LSTM(8, 16), torch.ones(4, 2, 8), threads=1, seconds=0.01)
    assert lstm.first_call_seconds not in lstm.block_seconds
