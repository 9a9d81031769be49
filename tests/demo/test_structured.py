import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.demo import digits, structured


@pytest.fixture(scope="module")
def shared(told):
    """One run for all tests that look at what it leaves."""
    result, out, screen, unchanged = told(structured.run)
    return result, out / "structured", screen, unchanged


def test_the_folder_holds_what_was_promised(shared):
    result, out, _, _ = shared
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == result
    names = {path.name for path in out.iterdir()}
    files = {f"{name}{kind}.safetensors" for name in ("dense", "pruned", "sparse") for kind in ("", ".packed")}
    assert names == files | {"run.json", "elsewhere.py", "test.safetensors"}


def test_the_smaller_model_is_an_ordinary_one_of_half_the_size(shared):
    result, out, _, _ = shared
    assert result["hidden"] == [128, 64]
    assert "(lstm): LSTM(8, 64, batch_first=True)" in result["smaller"]
    model = digits.LSTMClassifier(64)
    model.load_state_dict(load_file(out / "pruned.safetensors"))
    assert digits.accuracy(model, digits.load()) == pytest.approx(result["accuracy"]["smaller"])
    assert result["fresh_process"]["same_bits"]
    assert not result["fresh_process"]["secateur_importable"]


def test_the_sparse_one_has_as_many_weights(shared):
    weights = [digits.LSTMClassifier(), digits.LSTMClassifier()]
    for model, name in zip(weights, ("dense", "sparse"), strict=True):
        model.load_state_dict(load_file(shared[1] / f"{name}.safetensors"))
    left = sum(int(w.count_nonzero()) for w in sc.weights(weights[1]).values())
    assert left == sc.weights(digits.LSTMClassifier(64)).size
    files = shared[0]["files"]
    assert files["smaller"]["file_bytes"] < 0.3 * files["dense"]["file_bytes"]
    assert files["sparse"]["file_bytes"] == files["dense"]["file_bytes"]
    assert files["smaller"]["packed_bytes"] < files["sparse"]["packed_bytes"]


def test_accuracies_are_those_of_trained_models(shared):
    result = shared[0]
    assert set(result["accuracy"]) == set(structured.MODELS)
    assert all(0.5 < right <= 1 for right in result["accuracy"].values())
    assert set(result["comparisons"]) == {"1", "450"}


def test_the_table_tells_the_measured_numbers(shared, flat):
    result, out, screen, _ = shared
    for right in result["accuracy"].values():
        assert f"{100 * right:.2f} %" in screen
    for line in structured.meaning(result):
        assert flat(line) in flat(screen)
    narrow = io.StringIO()
    structured.tell(result, out, Console(file=narrow, width=80))
    assert "…" not in narrow.getvalue()


def test_the_words_follow_the_numbers(shared):
    result = json.loads(json.dumps(shared[0]))
    for one in result["comparisons"].values():
        one["verdict"].update(smaller="no difference")
    result["fresh_process"]["same_bits"] = False
    words = structured.meaning(result)
    assert "smaller, in plain torch: no difference for 1 image, no difference for 450 images" in words
    assert words[-1].endswith("OTHER answers")


def test_the_caller_keeps_random_numbers_and_threads(shared):
    assert shared[3]


@pytest.mark.parametrize(
    ("wrong", "error", "remedy"),
    [
        ({"epochs": 0}, sc.errors.InputError, "give 1 or more"),
        ({"seed": -1}, sc.errors.InputError, "from 0 to"),
        ({"sparsity": 0.0}, sc.errors.InputError, "give the fraction of the units"),
        ({"sparsity": 1.0}, sc.errors.InputError, "give the fraction of the units"),
        ({"sparsity": "half"}, sc.errors.InputError, "sparsity is 'half'"),
        ({"sparsity": 0.001}, sc.errors.StructureError, "nothing would go"),
    ],
)
def test_nonsense_is_refused_before_any_work(wrong, error, remedy, tmp_path):
    with pytest.raises(error, match=remedy):
        structured.run(**wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_passes_its_options_on(monkeypatch, flat):
    calls = []
    monkeypatch.setattr(structured, "run", lambda **options: calls.append(options) or {"seed": options["seed"]})
    done = CliRunner().invoke(app, ["demo", "--structured", "--sparsity", "0.25", "--seed", "7", "--json"])
    assert (done.exit_code, json.loads(done.stdout), done.stderr) == (0, {"seed": 7}, "")
    assert CliRunner().invoke(app, ["demo", "--structured"]).exit_code == 0
    calls = [{**one, "out": str(one["out"]), "console": one["console"] is not None} for one in calls]
    assert calls == [
        {"sparsity": 0.25, "seed": 7, "out": "secateur-demo", "console": False},
        {"seed": 0, "out": "secateur-demo", "console": True},
    ]
    refused = CliRunner().invoke(app, ["demo", "--structured", "--uncertainty"])
    assert refused.exit_code == 2
    assert "give one of them" in flat(refused.stderr)
