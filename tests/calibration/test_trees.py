"""Containers of tensors as JSON and back."""

import json
from collections import OrderedDict

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from secateur.calibration.trees import flat, told, tree
from secateur.errors import InputError


def there_and_back(value):
    tensors = []
    written = json.loads(json.dumps(flat(value, tensors, "it")))
    return tree(written, tensors), tensors


def test_containers_come_back():
    x = torch.randn(2)
    value = {"a": (x, [1, 2.5, None, True, "text"]), "b": OrderedDict(c=x)}
    found, tensors = there_and_back(value)
    assert tensors == [x]  # once
    assert found == {"a": (x, [1, 2.5, None, True, "text"]), "b": {"c": x}}
    assert type(found["a"]) is tuple


def test_packed_sequences_come_back():
    packed = pack_sequence([torch.ones(2, 1), torch.zeros(3, 1)], enforce_sorted=False)
    found, _ = there_and_back(packed)
    for mine, theirs in zip(found, packed, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, object(), [torch.float32]])
def test_what_no_file_holds_is_refused(value):
    with pytest.raises(InputError, match=r"the batch holds .* which no file of tensors holds: give batches of tensors"):
        flat(value, [], "the batch")


def test_a_batch_in_words():
    assert told((torch.zeros(1, 2), {"y": torch.zeros(3).int()})) == "a tuple (float32 [1, 2], a dict {y: int32 [3]})"
    assert told([[[torch.zeros(1)]]]) == "a list (a list (list))"
    assert told(list(range(20))).endswith("int, ...)")
