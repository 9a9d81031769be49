"""The demo of pruning after training: what it leaves, that it beats magnitude, and that its words are its numbers."""

import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.demo import after_training, digits


@pytest.fixture(scope="module")
def shared(told):
    """One run for all tests that look at what it leaves."""
    result, out, screen, unchanged = told(after_training.run)
    return result, out / "oneshot", screen, unchanged


def test_the_folder_holds_what_was_promised(shared):
    result, out, _, _ = shared
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == result
    files = {"dense.safetensors", "pruned.safetensors", "pruned.packed.safetensors", "test.safetensors"}
    assert {path.name for path in out.iterdir()} == files | {"run.json", "elsewhere.py"}


def test_it_beats_magnitude(shared):
    right = shared[0]["accuracy"]
    assert right["oneshot"] > max(right["magnitude, global"], right["magnitude, uniform"])
    assert shared[0]["tried"][shared[0]["way"]] == max(shared[0]["tried"].values())


def test_the_pruned_model_is_an_ordinary_one(shared):
    result, out, _, _ = shared
    model = digits.LSTMClassifier()
    model.load_state_dict(load_file(out / "pruned.safetensors"))
    zeros = sum(int((p == 0).sum()) for p in sc.weights(model).values())
    assert zeros == result["zeros"] == int(0.8 * result["weights"] + 0.5)
    assert digits.accuracy(model, digits.load()) == pytest.approx(result["accuracy"]["oneshot"])
    assert result["fresh_process"]["same_bits"]


def test_the_table_tells_the_measured_numbers(shared, flat):
    result, out, screen, unchanged = shared
    assert unchanged
    for right in result["accuracy"].values():
        assert f"{100 * right:.2f} %" in screen
    for line in after_training.meaning(result):
        assert flat(line) in flat(screen)
    narrow = io.StringIO()
    after_training.tell(result, out, Console(file=narrow, width=80))
    assert "…" not in narrow.getvalue()


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(sc.errors.InputError, match="between 0 and 1"):
        after_training.run(sparsity=0.0, out=tmp_path)
    done = CliRunner().invoke(app, ["demo", "--oneshot", "--structured"])
    assert done.exit_code == 2
