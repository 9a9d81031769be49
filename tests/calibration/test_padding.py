"""Which positions are padding."""

import pytest
import torch
from torch import nn

from secateur.calibration.padding import kept, real_keys, real_positions, told

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


def test_a_square_mask_may_say_which_positions_look_at_which():
    x, causal = torch.zeros(3, 3, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    real = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()

    class Named(nn.Module):
        def forward(self, x, mask=None, attn_mask=None, attention_mask=None, src_key_padding_mask=None):
            return x

    def found(**given):
        return [one.tolist() for one in real_positions(Named(), ((x,), given))]

    for mask in (real, causal, ~causal, causal.T):
        assert found(mask=mask) == found(attn_mask=mask) == []
    assert found(attention_mask=causal) == found(attention_mask=~causal) == []
    assert found(attention_mask=real) == found(src_key_padding_mask=~real) == [real.tolist()]
    assert found(mask=real[:2]) == [real[:2].tolist()]


def test_the_key_padding_masks_of_torch():
    real = MASK.bool()
    added = torch.zeros(2, 3).masked_fill(~real, -torch.inf)
    for mask in (~real, added, added.clamp_min(torch.finfo(torch.float16).min), added.half()):
        assert [one.tolist() for one in real_keys(mask)] == [real.tolist()]
    assert [one.tolist() for one in real_keys(~real[0])] == [real[:1].tolist()]
    assert real_keys(None) == real_keys(torch.zeros(2, 3)) == real_keys(real & False) == []


class Inside(nn.Module):
    """Makes the mask itself."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, ids):
        x = nn.functional.one_hot(ids, 4).float()
        return self.call(self.layer, x, ids == 0)


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=batch_first)


IDS = torch.tensor([[1, 2, 0], [3, 0, 0]])
LAST = [((2, 3), IDS != 0)]
TOLD = {
    "encoder": (encoder(), lambda layer, x, pad: layer(x, src_key_padding_mask=pad), LAST),
    "positions first": (encoder(False), lambda layer, x, pad: layer(x.transpose(0, 1), None, pad), [
        ((3, 2), (IDS != 0).T)
    ]),
    "layer": (encoder().layers[0], lambda layer, x, pad: layer(x, src_key_padding_mask=pad), LAST),
    "attention": (nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x, pad: layer(x, x, x, pad), LAST),
    "across": (nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x, pad: layer(x + 1, x, x, pad), []),
    "decoder": (
        nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 1),
        lambda layer, x, pad: layer(x, x, tgt_key_padding_mask=pad, memory_key_padding_mask=pad.roll(1, 0)),
        LAST,
    ),
    "all": (
        nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
        lambda layer, x, pad: layer(x, x, src_key_padding_mask=pad.roll(1, 0), tgt_key_padding_mask=pad),
        LAST,
    ),
    "then without": (encoder(), lambda layer, x, pad: layer(layer(x, src_key_padding_mask=pad)), []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", TOLD)
@torch.no_grad()
def test_what_modules_of_torch_are_told(name):
    layer, call, wanted = TOLD[name]
    model = Inside(layer, call).eval()
    with told(model) as masks:
        model(IDS)
    assert [(shape, mask.tolist()) for shape, mask in masks.items()] == [(s, mask.tolist()) for s, mask in wanted]
    assert not any(module._forward_pre_hooks for module in model.modules())
