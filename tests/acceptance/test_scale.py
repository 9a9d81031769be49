"""The bytes that a change of the masks sends are those of the formula of docs/scale.md, and the benchmark runs."""

import re
from pathlib import Path

import pytest
from benchmarks.scale import projected, run, table

PAGE = Path(__file__).parents[2] / "docs/scale.md"


def require_as_projected(row):
    if row["ranks"] == 1:
        assert row["sent"] == row["formula"] == row["calls"] == 0
    else:
        assert 0.5 * row["formula"] < row["sent"] <= row["formula"], row
        assert row["sent"] < 256 * 1024
    assert "update / Adam" in str(table([row]))


def test_the_bytes_are_as_projected():
    require_as_projected(run(2, 1, "fp32", "global", rounds=1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_whatever_the_processes_and_the_method(ranks, kind, allocation):
    require_as_projected(run(ranks, 10, kind, allocation, rounds=2))


def test_the_page_says_what_the_formula_gives():
    said = re.search(
        r"4,096 processes and 1,000\s+tensors[^.]*?([\d,]+) bytes[^.]*?([\d,]+) bytes", PAGE.read_text(), re.S
    )
    assert [int(number.replace(",", "")) for number in said.groups()] == [projected(1000), projected(1000, each=True)]
