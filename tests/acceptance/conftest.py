"""The helper models lie one folder up; processes without secateur are started here."""

import sys
from pathlib import Path

import pytest

from processes import Command, code

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run code in a process of its own in `tmp_path`, where secateur cannot be imported unless one says so."""
    monkeypatch.chdir(tmp_path)

    def run(text, *, secateur=False):
        start = "import sys; assert 'secateur' not in sys.modules\n"
        start += "" if secateur else "sys.modules['secateur'] = None\n"
        done = Command(code, start + text).done()
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
