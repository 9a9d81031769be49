"""secateur.demo.elsewhere: the pruned weights, where there is no secateur."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from secateur.demo import digits, elsewhere, story


def test_a_fresh_process_notices_one_changed_bit(shared, tmp_path):
    _, out, _, _ = shared
    for name in ("elsewhere.py", "pruned.safetensors", "pruned.packed.safetensors", "test.safetensors"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    test = load_file(tmp_path / "test.safetensors")
    test["logits"].view(torch.int32)[7, 3] ^= 1
    (tmp_path / "test.safetensors").write_bytes(story.to_bytes(test))
    assert story.load_elsewhere(tmp_path)["same_bits"] is False


def test_a_fresh_process_that_fails_is_an_error(tmp_path):
    (tmp_path / "elsewhere.py").write_bytes(Path(elsewhere.__file__).read_bytes())
    with pytest.raises(sc.errors.StateError, match=r"run .*elsewhere\.py to see why"):
        story.load_elsewhere(tmp_path)


def test_the_model_elsewhere_is_the_model_here():
    ours, theirs = digits.LSTMClassifier(), elsewhere.LSTMClassifier()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(5, 8, 8)
    assert torch.equal(ours(x), theirs(x))
