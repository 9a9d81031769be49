import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur.demo import digits, pictures, run, story

WEIGHTS = 4 * 128 * 8 + 4 * 128 * 128 + 10 * 128
FILES = {
    "run.json", "dense.safetensors", "pruned.safetensors", "pruned.packed.safetensors", "masks.safetensors",
    "test.safetensors", "elsewhere.py", "training.png", "layers.png",
}  # fmt: skip


def test_the_pruned_weights_are_exactly_the_zeros(shared):
    result, out, _, _ = shared
    asked = 63_821  # floor(0.9 * 70,912 + 1/2)
    weights, masks = load_file(out / "pruned.safetensors"), sc.Masks.load(out / "masks.safetensors")
    assert masks.size == result["weights"] == WEIGHTS
    assert masks.pruned == asked
    assert sum(int((weights[name] == 0).sum()) for name in masks) == asked
    assert sc.check(weights, masks) == {}
    assert not any(weights[name].eq(0).logical_and(weights[name].signbit()).any() for name in masks)  # +0.0
    assert result["gradual"]["zeros"] == result["one_shot"]["zeros"] == asked
    assert sum(layer["zeros"] for layer in result["layers"]) == asked
    assert result["dense"]["zeros"] == 0


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_any_epochs_and_sparsity_end_exactly(data, epochs, sparsity):
    model, masks = story.prune_gradually(digits.LSTMClassifier(), sparsity, data, epochs)
    assert masks.pruned == int(sparsity * WEIGHTS + 0.5)
    assert story.look_at(model, data)["zeros"] == masks.pruned


def test_the_folder_holds_what_was_promised_and_nothing_unfinished(shared):
    result, out, _, _ = shared
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == result
    for name in result["pictures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_model_has_the_keys_it_had(shared):
    result, out, _, _ = shared
    keys = list(digits.LSTMClassifier().state_dict())
    assert result["same_model"] is True
    assert sorted(load_file(out / "pruned.safetensors")) == sorted(load_file(out / "dense.safetensors")) == sorted(keys)


def test_a_renamed_key_would_be_noticed():
    model = digits.LSTMClassifier()
    torch.nn.utils.prune.l1_unstructured(model.head, "weight", 0.5)
    assert not story.same_model(model, digits.LSTMClassifier())


def test_a_fresh_process_without_secateur_agrees(shared):
    result, out, _, _ = shared
    fresh = {"secateur_importable": False, "same_bits": True, "accuracy": result["gradual"]["accuracy"]}
    assert result["fresh_process"] == fresh
    again = subprocess.run([sys.executable, out / "elsewhere.py"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == fresh


def test_pruned_at_once_is_worse_than_pruned_gradually(shared):
    result, _, _, _ = shared
    assert result["one_shot"]["accuracy"] < result["gradual"]["accuracy"] - 0.2


def test_rounds_of_what_remains_and_of_the_total(shared):
    rounds = shared[0]["rounds"]
    assert rounds["of_what_remains"] == pytest.approx([1 - 0.9**i for i in range(1, 11)], abs=1e-4)
    assert f"{rounds['of_what_remains'][-1]:.3f}" == "0.651"
    assert rounds["of_the_total"] == pytest.approx([0.09 * i for i in range(1, 11)], abs=1e-5)
    assert rounds["of_the_total"][-1] == 63_821 / WEIGHTS


def test_the_packed_file_is_smaller_and_the_same(shared):
    result, out, _, _ = shared
    packed, plain = out / "pruned.packed.safetensors", out / "pruned.safetensors"
    assert result["packed"]["bytes"] == packed.stat().st_size
    assert result["packed"]["over_plain"] == packed.stat().st_size / plain.stat().st_size < 0.13
    assert result["packed"]["same_bits"]
    weights = load_file(plain)
    back = sc.load(packed, verify=True)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_fast_model_answers_as_the_pruned_one_does(shared, data):
    result, out, _, _ = shared
    fast = result["fast"]
    assert fast["other_answers"] == 0
    assert fast["relative_error"] < 1e-5
    assert fast["accuracy"] == result["gradual"]["accuracy"]
    assert {layer["name"] for layer in fast["plan"]["layers"]} == {"lstm", "head"}
    model = digits.LSTMClassifier()
    sc.load(out / "pruned.safetensors", into=model)
    again = sc.accelerate(model, data.test_images[:1], threads=1, plan=fast["plan"])
    with torch.inference_mode():
        assert torch.allclose(again(data.test_images), model(data.test_images), atol=1e-4)


def test_the_fast_model_is_measured_for_one_image_and_for_all(shared):
    result, _, screen, _ = shared
    flat = " ".join(screen.replace("│", " ").split())
    comparisons = result["fast"]["comparisons"]
    assert list(comparisons) == ["1", "450"]
    for one in comparisons.values():
        assert list(one["measurements"]) == ["dense", "pruned", "fast"]
        assert all(measured["threads"] == 1 for measured in one["measurements"].values())
    assert " ".join(pictures._speed(result["fast"]).split()) in flat


def test_the_history_has_a_point_for_each_epoch(shared):
    history = shared[0]["history"]
    assert [point["step"] for point in history["dense"]] == [43, 86]
    assert [point["step"] for point in history["gradual"]] == [129, 172]
    assert [point["sparsity"] for point in history["dense_longer"]] == [0, 0]


def test_the_caller_keeps_random_numbers_and_threads(shared):
    assert shared[3]


def test_the_same_seed_gives_the_same_bits(data):
    one, same, other = (story.train_dense(data, 1, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("wrong", "error", "remedy"),
    [
        ({"epochs": 0}, sc.errors.InputError, "give 1 or more"),
        ({"epochs": True}, sc.errors.InputTypeError, "epochs is True: give a whole number"),
        ({"epochs": 2.0}, sc.errors.InputTypeError, "give a whole number"),
        ({"seed": "0"}, sc.errors.InputTypeError, "seed is '0'"),
        ({"seed": -1}, sc.errors.InputError, "from 0 to"),
        ({"sparsity": 1}, sc.errors.InputTypeError, "1.0"),
        ({"sparsity": 1.1}, sc.errors.InputError, "such as 0.9"),
        ({"sparsity": float("nan")}, sc.errors.InputError, "such as 0.9"),
        ({"sparsity": 0.99999}, sc.errors.InputError, "ask for less"),
    ],
)
def test_nonsense_is_refused_before_any_work(wrong, error, remedy, tmp_path):
    with pytest.raises(error, match=remedy):
        run(**wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_stays(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(sc.errors.InputError, match="give --out another name"):
        run(out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"
