"""The helper models lie one folder up; a fresh process is started here."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


@pytest.fixture
def elsewhere(tmp_path):
    """Run code in a fresh process in `tmp_path`, where secateur cannot be imported unless one says so."""

    def run(code, *, secateur=False):
        start = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        if not secateur:
            start += "sys.modules['secateur'] = None\n"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", start + code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
