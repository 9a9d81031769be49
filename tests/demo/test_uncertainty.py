import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.demo import digits, stage, uncertainty
from secateur.dropout import Prediction


@pytest.fixture(scope="module")
def shared(told):
    """One run for all tests that look at what it leaves."""
    result, out, screen, unchanged = told(uncertainty.run)
    return result, out / "uncertainty", screen, unchanged


def test_the_folder_holds_what_was_promised_and_is_not_that_of_the_plain_demo(shared):
    result, out, _, _ = shared
    assert {path.name for path in out.iterdir()} == {"run.json", "uncertainty.png"}
    assert [path.name for path in out.parent.iterdir()] == ["uncertainty"]
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == result
    assert (out / "uncertainty.png").read_bytes().startswith(b"\x89PNG")


def test_the_dropout_is_that_of_the_model(shared):
    found = shared[0]["dropout"]
    assert [(one["where"], one["kind"], one["rate"]) for one in found] == [
        ("lstm", "recurrent_hidden", 0.25),
        ("dropout", "dropout", 0.5),
    ]
    assert shared[0]["out_of_reach"] == []


def test_uncertainty_grows_with_the_noise(shared):
    levels = shared[0]["levels"]
    assert [level["noise"] for level in levels] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    for reading in uncertainty.READINGS:
        assert levels[0][reading]["accuracy"] > levels[-1][reading]["accuracy"] + 0.2
        assert all(0 <= level[reading]["sure"] <= level[reading]["unsure"] <= 1 for level in levels)
    assert levels[0]["samples"]["entropy"] > levels[0]["mutual_information"] > 0


def test_the_figures_are_those_of_the_model():
    data = digits.load()
    model = uncertainty.train_with_dropout(data, 1, seed=5)
    assert not model.training
    before = copy.deepcopy(model.state_dict())
    plain, prediction = uncertainty.look(model, data.test_images, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert prediction.samples.shape == (50, 450, 10)
    assert uncertainty.judge(plain, data.test_labels)["accuracy"] == pytest.approx(digits.accuracy(model, data))
    same, other = (uncertainty.train_with_dropout(data, 1, seed=seed) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.head.weight, other.head.weight)
    _, again = uncertainty.look(same, data.test_images, seed=5)
    assert torch.allclose(again.samples, prediction.samples, atol=1e-4)  # another way of sampling rounds otherwise


def test_the_noise_is_the_same_and_only_louder():
    images = torch.zeros(400, 8, 8)
    quiet, loud, other = (uncertainty.noisy(images, x, seed=s) for x, s in ((0.1, 0), (0.4, 0), (0.4, 1)))
    assert torch.allclose(4 * quiet, loud)
    assert not torch.equal(loud, other)
    assert float(loud.std()) == pytest.approx(0.4, rel=0.02)
    assert torch.equal(uncertainty.noisy(images, 0.0), images)


def test_judge_counts_by_hand():
    sure, unsure = torch.tensor([[0.9, 0.1]] * 18), torch.tensor([[0.55, 0.45]] * 2)
    found = uncertainty.judge(torch.cat([sure, unsure]), torch.tensor([0] * 18 + [1] * 2))
    assert found["accuracy"] == pytest.approx(0.9)
    assert (found["unsure"], found["sure"]) == (1, 0)  # a tenth is two
    assert found["confidence"] == pytest.approx((18 * 0.9 + 2 * 0.55) / 20)
    assert found["ece"] == pytest.approx((18 * 0.1 + 2 * 0.55) / 20)
    assert found["area"] == pytest.approx((1 / 19 * 1 + 2 / 20) / 20)


def test_the_least_sure_are_those_of_highest_entropy(shared):
    found = shared[0]["least_sure"]
    assert len(found) == uncertainty.SHOWN
    entropies = [one["entropy"] for one in found]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] > shared[0]["levels"][0]["samples"]["entropy"]
    data = digits.load()
    for one in found:
        assert one["label"] == int(data.test_labels[one["test_image"]])
        assert torch.equal(torch.tensor(one["pixels"]) / 16, data.test_images[one["test_image"]])
        assert sum(one["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert one["predicted"] == max(range(10), key=one["probabilities"].__getitem__)
        assert all(0 <= low <= high <= 1 for low, high in zip(one["low"], one["high"], strict=True))


def test_their_spread_is_one_of_probabilities():
    samples = torch.zeros(50, 8, 10)
    samples[:25, 0, 0], samples[25:, 0, 1] = 5.0, 5.0  # one half says 0, the other 1
    samples[:, 1:, 3] = 9.0
    first = uncertainty.least_sure(Prediction(samples), torch.zeros(8, 8, 8), torch.zeros(8))[0]
    assert first["test_image"] == 0
    assert first["std"] == pytest.approx(0.48, abs=0.02)
    assert first["mutual_information"] == pytest.approx(0.6, abs=0.1)


def test_the_table_tells_the_measured_numbers(shared, flat):
    result, out, screen, _ = shared
    for level in result["levels"]:
        for reading in uncertainty.READINGS:
            assert f"{100 * level[reading]['accuracy']:.2f} %" in screen
            assert f"{level[reading]['ece']:.3f}" in screen
    for line in uncertainty.meaning(result):
        assert flat(line) in flat(screen)
    assert str(out) in screen.replace("\n", "")
    assert max(map(len, screen.splitlines())) <= 120


def test_the_words_follow_the_numbers(shared):
    result = json.loads(json.dumps(shared[0]))
    for level in result["levels"]:
        for reading, value in (("plain", 0.1), ("samples", 0.2)):
            level[reading].update(ece=value, area=value, unsure=0.3, sure=0.0)
    words = uncertainty.meaning(result)
    assert words[2].endswith("30.00 % and 0.00 %; more among the former at every noise")
    assert words[3].endswith("at noise (none), and not at noise 0, 0.1, 0.2, 0.3, 0.4, 0.5")
    result["levels"][1]["samples"].update(ece=0.05, sure=0.4)
    result["out_of_reach"] = ["rand in lstm"]
    words = uncertainty.meaning(result)
    assert "OUT OF REACH: rand in lstm" in words[0]
    assert words[2].endswith("NO more among the former at noise 0.1")
    assert words[3].endswith("at noise 0.1, and not at noise 0, 0.2, 0.3, 0.4, 0.5")
    image = result["least_sure"][0]
    image.update(predicted=(image["label"] + 1) % 10)
    screen = io.StringIO()
    uncertainty.tell(result, shared[1], Console(file=screen, width=120))
    assert f"{image['predicted']} WRONG" in screen.getvalue()


def test_the_caller_keeps_random_numbers_and_threads(shared):
    assert shared[3]


def test_without_matplotlib_it_says_how_to_get_it(shared, monkeypatch, tmp_path):
    (tmp_path / "uncertainty.png").write_bytes(b"of an earlier run")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = dict(shared[0])
    stage.save_pictures(result, tmp_path, [uncertainty.PICTURE], uncertainty.draw)
    assert result["pictures"] == []
    assert list(tmp_path.iterdir()) == []
    screen = io.StringIO()
    uncertainty.tell(result, tmp_path, Console(file=screen, width=200))
    assert 'pip install "secateur[plot]"' in screen.getvalue()


def test_it_needs_neither_torchmetrics_nor_pyplot():
    code = """
import sys
sys.modules["torchmetrics"] = None
import json
import torch
from secateur.demo import uncertainty
assert "matplotlib" not in sys.modules
uncertainty.judge(torch.eye(10), torch.arange(10))
uncertainty.draw(json.load(sys.stdin))
assert "matplotlib.pyplot" not in sys.modules
"""
    image = {"predicted": 1, "label": 1, "pixels": torch.zeros(8, 8).tolist(), "entropy": 1.0}
    image |= {"mutual_information": 0.5, **{name: [0.1] * 10 for name in ("probabilities", "low", "high")}}
    one = uncertainty.judge(torch.eye(10), torch.arange(10))
    level = {"noise": 0.0, "plain": one, "samples": one, "mutual_information": 0.1}
    result = json.dumps({"levels": [level], "least_sure": [image, image]})
    subprocess.run([sys.executable, "-c", code], check=True, input=result, text=True)


@pytest.mark.parametrize(
    ("wrong", "error", "remedy"),
    [
        ({"epochs": 0}, sc.errors.InputError, "give 1 or more"),
        ({"epochs": True}, sc.errors.InputTypeError, "give a whole number"),
        ({"seed": "0"}, sc.errors.InputTypeError, "seed is '0'"),
        ({"seed": -1}, sc.errors.InputError, "from 0 to"),
    ],
)
def test_nonsense_is_refused_before_any_work(wrong, error, remedy, tmp_path):
    with pytest.raises(error, match=remedy):
        uncertainty.run(**wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["out", "out/uncertainty"])
def test_a_file_in_the_place_of_the_folder_stays(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("precious")
    with pytest.raises(sc.errors.InputError, match="give --out another name"):
        uncertainty.run(out=tmp_path / "out")
    assert (tmp_path / file).read_text() == "precious"


def test_the_command_passes_its_options_on(monkeypatch, flat):
    calls = []
    monkeypatch.setattr(uncertainty, "run", lambda **options: calls.append(options) or {"seed": options["seed"]})
    done = CliRunner().invoke(
        app, ["demo", "--uncertainty", "--epochs", "3", "--seed", "7", "--out", "there", "--json"]
    )
    assert (done.exit_code, json.loads(done.stdout), done.stderr) == (0, {"seed": 7}, "")
    assert CliRunner().invoke(app, ["demo", "--uncertainty"]).exit_code == 0
    calls = [{**one, "out": str(one["out"]), "console": one["console"] is not None} for one in calls]
    assert calls == [
        {"epochs": 3, "seed": 7, "out": "there", "console": False},
        {"seed": 0, "out": "secateur-demo", "console": True},
    ]
    refused = CliRunner().invoke(app, ["demo", "--uncertainty", "--sparsity", "0.5"])
    assert refused.exit_code == 2
    assert "leave out --sparsity" in flat(refused.stderr)
