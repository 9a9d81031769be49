"""What lies in memory and what lies on disk are the same numbers; a folder knows its run."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from secateur.calibration.run_folder import InputsInMemory, RunFolder, batches_digest
from secateur.errors import FileError, InputError
from secateur.masks import Masks


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_inputs_are_taken_as_they_were_laid(tmp_path, kind):
    inputs = InputsInMemory() if kind == "memory" else RunFolder(tmp_path, {}).inputs()
    tensors = {
        "0": torch.randn(3, 4).T,
        "1.0": torch.tensor(True).expand(2, 3),
        "2": torch.randn(2, dtype=torch.bfloat16),
    }
    inputs.lay("0001", 5, tensors)
    found = inputs.take("0001", 5, ["2", "0", "1.0"])
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert all(found[key].is_contiguous() and found[key].dtype == tensor.dtype for key, tensor in tensors.items())
    inputs.leave("0001", 5, ["0"])
    assert torch.equal(inputs.take("0001", 5, ["0"])["0"], tensors["0"])
    inputs.clear("0001")
    with pytest.raises((KeyError, FileError), match="0001"):
        inputs.take("0001", 5, ["0"])


def test_a_section_is_read_as_it_was_written(tmp_path):
    told = {"settings": {"sparsity": 0.5}, "batches": "abc"}
    run = RunFolder(tmp_path / "run", told)
    assert run.done == 0
    weights, masks = {"a.weight": torch.eye(3)}, Masks({"a.weight": torch.eye(3).bool()})
    run.save(0, weights, masks)
    run.finish(0)
    again = RunFolder(tmp_path / "run", told)
    found, kept = again.load(0)
    assert again.done == 1
    assert torch.equal(found["a.weight"], weights["a.weight"])
    assert kept == masks
    (tmp_path / "run/sections/0000.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(FileError, match=r"damaged .*: remove .*run, and prune again"):
        again.load(0)


def damaged_ones():
    names = ("inputs/first/00000.safetensors", "sections/0000.masks.safetensors", "sections/0000.safetensors")
    return [(name, content) for name in names for content in (None, b"", b"x" * 20)]


@pytest.mark.parametrize(("name", "content"), damaged_ones())
def test_every_damaged_file_says_what_to_do(tmp_path, name, content):
    folder = RunFolder(tmp_path / "run", {})
    folder.save(0, {"a": torch.ones(3)}, Masks({"a": torch.tensor([True, False, True])}))
    inputs = folder.inputs()
    inputs.lay("first", 0, {"x": torch.ones(2)})
    path = tmp_path / "run" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=rf"{path.name} is damaged .*: remove .*run, and prune again"):
        _ = inputs.take("first", 0, ["x"]) if "inputs" in name else folder.load(0)


def test_another_run_is_refused(tmp_path):
    RunFolder(tmp_path, {"settings": 1, "model": "a", "batches": "b"}).finish(0)
    with pytest.raises(InputError, match="another run, with other settings and of another model: give another folder"):
        RunFolder(tmp_path, {"settings": 2, "model": "c", "batches": "b"})
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(FileError, match=r"run.json is damaged .*give another folder"):
        RunFolder(tmp_path, {})


def test_the_settings_that_differ_are_named(tmp_path):
    settings = {"solver": "alps", "sparsity": 0.8, "zeros": {"a": 8, "b": 8}}
    RunFolder(tmp_path, {"settings": settings}).finish(0)
    found = r"with other settings \(solver: asked wanda, there alps; sparsity: asked 0.7, there 0.8\): give another"
    with pytest.raises(InputError, match=found):
        RunFolder(tmp_path, {"settings": {"solver": "wanda", "sparsity": 0.7, "zeros": {"a": 7, "b": 7}}})
    with pytest.raises(InputError, match=r"\(zeros of b: asked 7, there 8\): give another folder"):
        RunFolder(tmp_path, {"settings": {**settings, "zeros": {"a": 8, "b": 7}}})
    with pytest.raises(InputError, match=r"\(more: asked 1, there none\): give another folder"):
        RunFolder(tmp_path, {"settings": {**settings, "more": 1}})


def test_batches_are_told_from_one_another():
    x, packed = torch.randn(2, 3), pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    calls = [
        ((x,), {}),
        ((x + 1,), {}),
        ((x,), {"flag": True}),
        ((x,), {"flag": False}),
        ((packed,), {}),
        ((), {"x": x}),
    ]
    assert len({batches_digest([call]) for call in calls}) == len(calls)
    assert batches_digest(calls) == batches_digest(calls) != batches_digest(calls[::-1])
