from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import StructureError
from secateur.structure.policy import POLICIES, Policy, relied_on


def test_heads_go_whole_before_parts_of_them():
    assert POLICIES[0].whole_heads
    assert len(set(POLICIES)) == len(POLICIES)


def test_configs_that_cannot_tell_are_left_behind_last():
    assert [policy.told for policy in POLICIES] == [True] * (len(POLICIES) - 1) + [False]


def numbers(*values):
    return [torch.tensor(float(value)) for value in values]


def test_beside_logits_the_inner_states_are_not_relied_on():
    names = "logits", "hidden_states", "last_hidden_state", "past_key_values", "image_embeds"
    out = dict(zip(names, numbers(1, 2, 3, 4, 5), strict=True))
    assert relied_on(out) == numbers(1, 5)


def test_without_logits_all_but_the_cache_is_relied_on():
    one, two = numbers(3, 4)
    assert relied_on({"last_hidden_state": one, "past_key_values": two}) == [one]
    assert relied_on((one, [two])) == [one, two]


@dataclass(slots=True)
class Slots:
    y: Any


class Box:
    def __init__(self, y):
        self.y, self.me, self.model = y, self, nn.Linear(2, 2)


class DynamicCache(Box):
    pass


@pytest.mark.parametrize(
    "wrap", [Slots, Box, SimpleNamespace, lambda y: frozenset([y]), lambda y: (3, [Slots({1: y})])]
)
def test_tensors_are_found_in_any_object(wrap):
    (y,) = numbers(7)
    made = wrap(y=y) if wrap is SimpleNamespace else wrap(y)
    assert relied_on(made) == [y]
    assert relied_on(DynamicCache(y)) == []


def test_policies_that_answer_alike():
    assert Policy(cut_remade=True).like(["whole_heads"]) == Policy()
    assert Policy(cut_remade=True).like(["cut_remade"]) == Policy(cut_remade=True)


def test_a_generator_is_no_output_that_can_be_followed():
    with pytest.raises(
        StructureError, match="returns a generator, whose tensors are made after its forward: give a list"
    ):
        relied_on({"out": (y for y in numbers(1))})
