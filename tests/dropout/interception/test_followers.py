"""Dropout calls that are met again: the same ones, in the same order, or the way is unsuitable."""

from dataclasses import replace

import pytest
import torch

from secateur.dropout.interception.followers import Follower, Unsuitable
from secateur.dropout.interception.handlers import DropoutCall

CALLS = [
    DropoutCall("a", "dropout", 0.5, torch.Size([2, 3]), seen=0.5),
    DropoutCall("b", "lstm", 0.0, torch.Size([2, 3]), seen=0.1),
]


def test_calls_come_in_order_and_those_that_are_off_are_left_alone():
    follower = Follower(CALLS)
    assert follower.meet("dropout", 0.5, False, (2, 3)) is CALLS[0]
    assert follower.meet("lstm", 0.1, False, (2, 3)) is None


@pytest.mark.parametrize("kinds", [["lstm"], ["dropout", "dropout"], ["dropout", "lstm", "dropout"]])
def test_other_calls(kinds):
    follower = Follower([replace(call, seen=None) for call in CALLS])

    def meet_all():
        for kind in kinds:
            follower.meet(kind, None, False, (2, 3))

    with pytest.raises(Unsuitable, match="other dropout calls from one pass to the next"):
        meet_all()


def test_another_rate():
    with pytest.raises(Unsuitable, match="rate of dropout in a is not what it was"):
        Follower(CALLS).meet("dropout", 0.4, False, (2, 3))
