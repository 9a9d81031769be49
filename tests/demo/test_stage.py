"""secateur.demo.stage: settings that make sense, and a folder in which no file is half there."""

import io
import sys

import pytest
import torch
from rich.console import Console

import secateur as sc
from secateur.demo import pictures, stage


def test_without_matplotlib_it_says_how_to_get_it(shared, monkeypatch, tmp_path):
    (tmp_path / "training.png").write_bytes(b"of an earlier run")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = dict(shared[0])
    stage.save_pictures(result, tmp_path, pictures.NAMES, pictures.draw)
    assert result["pictures"] == []
    assert list(tmp_path.iterdir()) == []
    screen = io.StringIO()
    pictures.tell(result, tmp_path, Console(file=screen, width=200))
    assert 'pip install "secateur[plot]"' in screen.getvalue()


@pytest.mark.parametrize(
    ("epochs", "seed", "error", "remedy"),
    [
        (0, 0, sc.errors.InputError, "give 1 or more"),
        (True, 0, sc.errors.InputTypeError, "give a whole number"),
        (1, 2**64, sc.errors.InputError, "give a number from 0 to 2"),
    ],
)
def test_nonsense_is_refused(epochs, seed, error, remedy, tmp_path):
    stage.require(1, 0, tmp_path, tmp_path / "new")
    with pytest.raises(error, match=remedy):
        stage.require(epochs, seed, tmp_path)


def test_a_file_is_whole_or_not_there(tmp_path):
    stage.write(tmp_path / "a", b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"whole")]


def test_it_says_what_has_run():
    assert stage.versions()["secateur"] == sc.__version__
    assert stage.versions()["torch"] == torch.__version__
