"""secateur.demo.pictures: the table and the plots tell what was measured, failures too."""

import json
import subprocess
import sys

import pytest

import secateur as sc
from secateur.demo import digits, pictures, story


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("2.00x faster", "one image 2.00x faster, 450 images 2.00x faster"),
        ("no difference", "one image no faster on this machine, 450 images no faster on this machine"),
        ("1.30x slower", "one image 1.30x slower, 450 images 1.30x slower"),
    ],
)
def test_the_words_on_speed_are_those_of_the_measurement(shared, verdict, words):
    result = json.loads(json.dumps(shared[0]))
    for one in result["fast"]["comparisons"].values():
        one["verdict"]["fast"] = verdict
    assert words in pictures._speed(result["fast"])
    assert pictures.story(result)[-1][3].count(verdict.replace("no difference", "no faster on this machine")) == 2


def test_a_layer_that_stays_dense_is_named(shared, data):
    plan = sc.explain(story.speed_up(digits.LSTMClassifier(), data)).to_dict()
    words = pictures._race({**shared[0]["fast"], "plan": plan})
    assert "; left dense: lstm (" in words  # too dense, or there are no native kernels
    assert words.endswith("), head (too dense: 0.00 % zeros)")


def test_the_table_tells_the_measured_numbers(shared):
    result, out, screen, _ = shared
    flat = " ".join(screen.replace("│", " ").split())
    for key in ("dense", "one_shot", "gradual", "dense_longer"):
        assert f"{100 * result[key]['accuracy']:.2f} %" in flat
    for words in ("63,821", "1 - 0.9^10 = 0.651", "10 x 0.09 = 0.9", "bit for bit", "run.json"):
        assert words in flat
    assert " ".join(result["comparison"]["summary"].split()) in flat
    assert str(out) in screen.replace("\n", "")


def test_the_table_hides_no_failure(shared):
    result = {**shared[0], "same_model": False}
    result |= {key: {**result[key], "same_bits": False} for key in ("fresh_process", "packed")}
    result["fast"] = {**result["fast"], "other_answers": 3}
    meanings = " ".join(row[3] for row in pictures.story(result))
    assert "OTHER module" in meanings
    assert "OTHER predictions" in meanings
    assert "OTHER bits" in meanings
    assert "3 OTHER answers" in meanings


def test_drawing_leaves_pyplot_and_its_settings_alone(shared):
    code = """
import json, sys
from secateur.demo import pictures
assert "matplotlib" not in sys.modules
figures = pictures.draw(json.load(sys.stdin))
assert list(figures) == list(pictures.NAMES)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, input=json.dumps(shared[0]), text=True)
