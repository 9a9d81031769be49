"""Which positions are padding."""

import torch
from torch import nn

from secateur.calibration.padding import kept, real_positions

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Reads(nn.Module):
    def forward(self, x, attention_mask=None, *, src_key_padding_mask=None, labels=None, **more):
        return x


def masks(*args, **kwargs):
    return real_positions(Reads(), (args, kwargs))


def test_a_mask_is_known_by_its_name_wherever_it_stands():
    x = torch.zeros(2, 3, 4)
    for found in (masks(x, MASK), masks(x, attention_mask=MASK.bool()), masks(x, src_key_padding_mask=MASK == 0)):
        assert [mask.tolist() for mask in found] == [MASK.bool().tolist()]
    assert len(masks(x, decoder_attention_mask=MASK)) == 1


def test_what_is_no_mask_of_positions_is_none():
    x = torch.zeros(2, 3, 4)
    assert masks(x, labels=MASK) == []
    assert masks(x, attention_mask=MASK.float()) == []
    assert masks(x, attention_mask=MASK.view(2, 1, 3)) == []
    assert masks(x, attention_mask=MASK + 1) == []
    assert masks(x, attention_mask=torch.ones_like(MASK)) == []


def test_samples_in_each_order():
    real = MASK.bool()
    assert kept([real], (2, 3)).tolist() == [True, True, False, True, False, False]
    assert kept([real], (6,)).tolist() == [True, True, False, True, False, False]
    assert kept([real], (3, 2), time_first=True).tolist() == [True, True, True, False, False, False]
    assert kept([real], (2, 3, 2)).tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 4


def test_another_shape_has_no_mask_and_two_that_differ_are_none():
    real = MASK.bool()
    assert kept([real], (3, 2)) is None
    assert kept([real], (5,)) is None
    assert kept([], (2, 3)) is None
    assert kept([real, ~real], (2, 3)) is None
    assert kept([real, real.clone()], (2, 3)) is not None
