"""Damaged and forged packed files by the thousand, in a process of their own: `mutants.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).with_name("mutants.py")
MEMORY = 256 << 20
"""Bytes that reading any of these files of a few kB may take at most."""


def survive(folder, first, count, seconds):
    command = [sys.executable, MUTANTS, folder, str(first), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs at seed {(folder / 'seed').read_text()}")
    if done.returncode:
        pytest.fail(f"crashed ({done.returncode}) at seed {(folder / 'seed').read_text()}: {done.stderr[-3000:]}")
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["grown"] < MEMORY
    told = result["told"]
    assert sum(told.values()) == count
    for how in ("flips", "overwritten", "truncated", "longer", "shorter", "spliced", "header", "swapped"):
        assert told[f"{how} refused"] > 10
    for how in ("manifest", "blob", "both"):
        assert told[f"{how} refused"] > 10
        assert told[f"{how} kept"] > 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space is bounded as Linux does")
def test_two_thousand_mutants(tmp_path):
    survive(tmp_path, 0, 2_000, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space is bounded as Linux does")
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_mutants(tmp_path, part):
    survive(tmp_path, 1_000_000 + 10_000 * part, 10_000, 1800)
