"""Plans are plain data, choose for sizes never seen, and print."""

import json

import pytest

from secateur.errors import FileError
from secateur.runtime.kernel_plans import Gain, KernelPlan, LayerPlan, Timing, without


def layer(*chosen, reason=""):
    timings = tuple(Timing(b, 2e-3, 1e-6, sparse) for b, sparse in chosen)
    return LayerPlan("encoder.0", "Linear", (64, 32), 0.9, "cafe", timings, reason)


PLAN = KernelPlan("cpu", "avx2", 1, (layer((0, True), (7, False)), layer(reason="too dense")), (Gain(2.0, 1.9, 2.1),))


def chosen(plan):
    return [b for b in range(12) if plan.choices >> b & 1]


def test_sizes_never_seen_go_as_the_nearest_one():
    assert chosen(layer((0, True))) == list(range(12))
    assert chosen(layer((0, False))) == []
    assert chosen(layer((0, True), (7, False))) == [0, 1, 2, 3]
    assert chosen(layer((3, False), (7, True))) == [6, 7, 8, 9, 10, 11]  # 5 is as near to both: dense
    assert chosen(layer((0, True), reason="too dense")) == []
    assert chosen(layer()) == []


def test_without():
    both = layer((0, True), (7, True))
    assert [t.sparse for t in without(both, {7}, "why").timings] == [True, False]
    assert without(both, {7}, "why").reason == ""
    assert without(both, {0, 7}, "why").reason == "why"
    assert without(layer((0, False), reason="first"), set(), "why").reason == "first"


def test_round_trips_through_json():
    assert KernelPlan.from_dict(PLAN.to_dict()) == PLAN
    assert KernelPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert PLAN.sparse == ("encoder.0",)


@pytest.mark.parametrize("spoil", [{"version": 2}, {"layers": [{}]}, {"gains": [{"speed": 1}]}, {"cpu": None}])
def test_what_is_no_plan_is_refused(spoil):
    data = {**PLAN.to_dict(), **spoil}
    if spoil == {"cpu": None}:
        del data["cpu"]
    with pytest.raises(FileError, match="Tune again, without plan"):
        KernelPlan.from_dict(data)


def test_prints_what_was_chosen_and_why():
    text = str(PLAN)
    lines = text.splitlines()
    assert lines[2].split() == [
        "encoder.0",
        "Linear",
        "64",
        "x",
        "32",
        "90.00",
        "%",
        "1",
        "2",
        "ms",
        "1",
        "µs",
        "sparse",
    ]
    assert lines[3].split() == ["65-128", "2", "ms", "1", "µs", "dense"]
    assert lines[4].endswith("dense: too dense")
    assert "the whole model: faster: 2.00x, 95 % interval 1.90x to 2.10x" in text
    assert lines[-1] == "native kernels: avx2; threads: 1; CPU: cpu"
    assert PLAN.markdown().startswith("| layer")


def test_says_that_nothing_was_gained():
    assert "no faster, all of it dense" in str(KernelPlan("cpu", None, 1, (layer(reason="not faster"),)))
    assert "no native library: torch's CSR" in str(KernelPlan("cpu", None, 1, ()))
    assert str(Gain(1.0, 0.9, 1.1)) == "no faster (1.00x, 95 % interval 0.90x to 1.10x): left dense"
    assert not Gain(1.0, 0.9, 1.1).faster
    assert Gain(1.2, 1.1, 1.3).faster


def test_layers_that_were_timed_as_one_share_a_row():
    timings = (Timing(0, 1e-4, 5e-5, True), Timing(5, 1e-3, 5e-4, True))
    many = [
        LayerPlan(f"layers.{i}.{part}", "Linear", (64, 64), zeros, "x", timings)
        for i, zeros in enumerate((0.9, 0.899, 0.9, 0.901))
        for part in ("q", "k")
    ]
    other = LayerPlan("layers.4.q", "Linear", (64, 64), 0.9, "x", timings[:1])
    run = [LayerPlan(f"layers.{i}.mlp[:]", "Mlp", (64, 99, 64), 0.9, "x", timings) for i in range(3)]
    plan = KernelPlan("cpu", "avx2", 1, (*many, other, *run), (Gain(2.0, 1.9, 2.1),))
    table = plan.table()
    assert [(row[0], row[3], row[4]) for row in table.rows] == [
        ("layers.{0..3}.q", "89.90-90.10 %", "1"),
        ("", "", "17-32"),
        ("layers.{0..3}.k", "89.90-90.10 %", "1"),
        ("", "", "17-32"),
        ("layers.4.q", "90.00 %", "1"),
        ("layers.{0..2}.mlp[:]", "90.00 %", "1"),
        ("", "", "17-32"),
    ]
    assert "runs" not in table.header
    assert table.notes[:2] == [
        "all of them run sparse",
        "layers.{0..2}.mlp[:]: several layers; dense is one after the other, sparse is one call for all",
    ]
    assert len(plan.layers) == 12
    dense = LayerPlan("head", "Linear", (9, 64), 0.0, reason="too dense: 0.00 % zeros")
    assert [row[-1] for row in KernelPlan("cpu", "avx2", 1, (*many, dense)).table().rows] == [
        *["sparse"] * 4,
        "dense: too dense: 0.00 % zeros",
    ]


@pytest.mark.parametrize("columns", [60, 90, 160])
def test_a_printed_plan_fits_its_terminal(monkeypatch, columns):
    timings = (Timing(0, 1e-4, 5e-5, True), Timing(5, 1e-3, 5e-4, False))
    layer = LayerPlan("encoder.attention.self.query", "Linear", (1024, 1024), 0.9, "x", timings)
    plan = KernelPlan("cpu", "avx2", 1, (layer,), (Gain(2.0, 1.9, 2.1),))
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, str(plan).splitlines())) <= columns
    assert ("\n\n" in str(plan)) == (columns == 60)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", None)  # as in a pipe
    assert 80 < max(map(len, str(plan).splitlines())) <= 100


def test_the_parts_of_a_wide_table_say_which_rows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    timings = (Timing(0, 1e-4, 5e-5, True), Timing(5, 1e-3, 5e-4, True))
    layer = LayerPlan("encoder.attention", "Linear", (1024, 1024), 0.9, "x", timings, "a reason that takes its room")
    run = LayerPlan("head[0:2]", "Sequential", (1024, 1024, 10), 0.9, "x", timings)
    text = str(KernelPlan("cpu", "avx2", 1, (layer, run)))
    parts = text.split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert "17-32" in part
    assert "head[0:2]: several layers; dense is one after the other" in text
