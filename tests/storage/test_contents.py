"""secateur.storage.contents: totals, ratios and tables of what a file holds."""

import json

import pytest
import torch

from secateur.storage.contents import Contents, TensorInfo, info, notes
from secateur.storage.stored import Alias, InMemory

HALF = TensorInfo("half", "float32", (2, 4), 8, 4, 32, "lossless", 20)
FULL = TensorInfo("full", "float32", (2,), 2, 0, 8, "plain", 8)


def test_a_tensor_of_nothing_has_no_zeros_and_is_no_smaller():
    nothing = TensorInfo("none", "float32", (0, 3), 0, 0, 0)
    assert (nothing.sparsity, nothing.ratio) == (0.0, 1.0)
    assert Contents("m", (), 8).ratio == 1.0
    assert (HALF.sparsity, HALF.ratio) == (0.5, 0.625)


def test_the_total_of_a_whole_file_counts_its_headers():
    contents = Contents("m", (HALF, FULL), 100)
    assert (contents.total.weights, contents.total.zeros, contents.total.bytes) == (10, 4, 40)
    assert contents.total.stored_bytes == contents.file_bytes == 100
    assert contents.ratio == contents.total.ratio == 2.5
    assert contents.total.sparsity == 0.4


def test_the_total_of_a_part_does_not():
    contents = Contents("m", (HALF,), 100, dense_bytes=400)
    assert contents.total.stored_bytes == 20
    assert contents.ratio == 0.25
    assert "the file takes 100 B, 0.25 of the 400 B of all its tensors" in str(contents)


def header(contents):
    return contents.table().header


def test_a_table_shows_only_the_columns_that_say_something():
    plain = ["tensor", "dtype", "shape", "weights", "zeros", "sparsity", "size"]
    assert list(header(Contents("m", (FULL,), 8))) == plain
    assert list(header(Contents("m", (FULL, HALF), 28))) == [*plain, "coding", "stored", "ratio"]
    lossy = TensorInfo("lossy", "float32", (2,), 2, 0, 8, "near", 3, error=0.004)
    contents = Contents("m", (FULL, lossy), 11)
    assert list(header(contents)) == [*plain, "coding", "stored", "ratio", "error"]
    assert [row[-1] for row in contents.table().rows] == ["", "0.004", ""]


def test_as_data_it_is_json_with_the_same_numbers():
    told = json.loads(json.dumps(Contents("m", (HALF, FULL), 100, ("a note",)).to_dict()))
    assert [t["name"] for t in told["tensors"]] == ["half", "full"]
    assert (told["tensors"][0]["shape"], told["tensors"][0]["ratio"]) == ([2, 4], 0.625)
    assert (told["total"]["zeros"], told["total"]["sparsity"]) == (4, 0.4)
    assert told["file"] == {"bytes": 40, "stored_bytes": 100, "ratio": 2.5}
    assert told["notes"] == ["a note"]


def test_the_facts_of_a_stored_tensor():
    stored = InMemory("w", torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert info(stored, stored.zeros()) == TensorInfo("w", "float32", (2, 2), 4, 2, 16, "plain", 16)
    written = info(stored, 2, coding="near", stored_bytes=5, error=0.1)
    assert (written.coding, written.stored_bytes, written.error) == ("near", 5, 0.1)
    tied = info(Alias("v", stored), 2)
    assert (tied.coding, tied.stored_bytes, tied.bytes) == ("tied to w", 0, 16)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["a.weight_orig", "a.weight_mask", "b.weight_orig", "b.weight_mask", "c"], 2),
        (["a.weight_orig"], 0),
        (["a.weight_mask", "a.weight"], 0),
    ],
)
def test_names_of_torch_prune_are_noted_with_what_makes_them_plain(names, count):
    told = notes(names)
    assert len(told) == bool(count)
    for note in told:
        assert note.startswith(f"{count} tensors (_orig, _mask)")
        assert "secateur.from_torch_prune(model)" in note
