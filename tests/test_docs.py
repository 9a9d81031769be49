"""The Python blocks of the README and of docs/ run, page by page, in a folder of their own.

What they train they train on a quarter of the digits, which takes a quarter of the time; with `-m slow` on all.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from secateur.demo import digits

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def a_quarter(data):
    return dataclasses.replace(data, train_images=data.train_images[::4], train_labels=data.train_labels[::4])


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # of Lightning
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of Ignite
@pytest.mark.parametrize("every_digit", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "every digit"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, every_digit):
    monkeypatch.chdir(tmp_path)
    if not every_digit:
        monkeypatch.setattr(digits, "load", lambda load=digits.load: a_quarter(load()))
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 2
        exec(compile("\n" * (line - 1) + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_code_to_run():
    assert BLOCK.search((ROOT / "README.md").read_text())
