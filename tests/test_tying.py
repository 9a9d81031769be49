"""secateur.tying: which Parameters are the same numbers."""

import pytest
import torch
from torch import nn

from secateur import tying
from secateur.errors import InputError


def test_each_parameter_goes_by_all_its_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    assert [[name for name, _, _ in held] for held in tying.holders(model)] == [["0.weight", "2.weight"], ["1.weight"]]


def test_one_piece_of_memory_counts_once():
    whole = torch.randn(4, 6)
    tensors = {"a": nn.Parameter(whole), "turned": nn.Parameter(whole.t()), "copy": whole.clone(), "part": whole[:2]}
    assert list(tying.distinct(tensors)) == ["a", "copy", "part"]


def test_empty_and_lazy_ones_are_told_apart():
    lazy = nn.LazyLinear(3)
    tensors = {"a": torch.empty(0), "b": torch.empty(0), "c": lazy.weight, "d": lazy.bias}
    assert list(tying.distinct(tensors)) == ["a", "b", "c", "d"]


def overlapping(*parts):
    model = nn.Module()
    for name, part in zip("abc", parts, strict=True):
        model.register_parameter(name, nn.Parameter(part))
    return tying.holders(model)


def test_overlaps_are_refused_where_they_touch_the_scope():
    memory = torch.randn(24)
    held = overlapping(memory[:12], memory[8:16], memory[20:])
    tying.refuse_overlaps(held, ["c"])
    with pytest.raises(InputError, match=r"b shares some of its numbers in memory with a.*give one its own"):
        tying.refuse_overlaps(held, ["b"])


def test_a_piece_overlaps_another_that_is_no_neighbour():
    memory = torch.randn(24)
    every_other, inside, further = memory[::2], memory[1:2], memory[10:14]
    held = overlapping(every_other, inside, further)
    with pytest.raises(InputError, match=r"c shares some of its numbers in memory with a.*give one its own"):
        tying.refuse_overlaps(held, ["a", "b", "c"])
