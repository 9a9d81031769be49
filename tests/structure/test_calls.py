import pytest
import torch
from torch import Tensor, nn

from secateur.structure.calls import in_place, key, results, tensors


def test_plain_names():
    assert [key(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__iadd__)] == ["add", "add", "__iadd"]


@pytest.mark.parametrize("func", [Tensor.add_, Tensor.__iadd__, nn.init.zeros_])
def test_what_writes_into_its_argument(func):
    assert in_place(func)


@pytest.mark.parametrize("func", [torch.add, Tensor.__add__, Tensor.__int__, Tensor.__iter__, Tensor.__invert__])
def test_what_writes_nowhere(func):
    assert not in_place(func)


def test_tensors_of_containers_and_what_is_written_to():
    a, b = torch.ones(2), torch.zeros(2)
    assert [t is x for t, x in zip(tensors(((a, 3), {"b": [b, None]})), (a, b), strict=True)] == [True, True]
    assert results("__setitem", (a, 0, b), None)[0] is a
