"""Rows of a convolution's input: the kernel times them is what torch computes."""

import pytest
import torch
from torch import nn

from secateur.anatomy import layout
from secateur.calibration import patches as rooms
from secateur.calibration.patches import Geometry, patches

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    "strided, padded": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 3, 7, 6)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv1d(4, 4, 5, groups=4, padding=2), (3, 4, 11)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (2, 3, 6, 6)),
    "valid": (nn.Conv1d(3, 4, 4, padding="valid"), (2, 3, 9)),
    "no batch": (nn.Conv1d(3, 4, 2), (3, 9)),
    "3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 6, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 4, 5)),
    "transposed, strided": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4, 5)),
    "transposed, dilated": (nn.ConvTranspose1d(3, 4, 3, stride=3, dilation=2, padding=5), (2, 3, 6)),
}


def geometry(layer):
    kernel = layer.weight.shape[2:]
    if layer.transposed:
        return Geometry.turned(kernel, layer.stride, layer.padding, layer.dilation, layer.groups, layer.output_padding)
    return Geometry.of(kernel, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_the_kernel_times_the_rows_is_the_output(name):
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(list(patches(x, geometry(layer))), 1)
    kernel = layout(layer, "weight", layer.weight).outputs_first(layer.weight)
    made = rows @ kernel.reshape(layer.groups, -1, rows.shape[-1]).mT  # [groups, samples, outputs of each]
    layer_out = layer(x) - layer.bias.view(-1, *[1] * (len(shape) - (2 if x.ndim == layer.weight.ndim else 1)))
    out = layer_out if x.ndim == layer.weight.ndim else layer_out.unsqueeze(0)
    wanted = out.movedim(1, -1).reshape(-1, layer.groups, out.shape[1] // layer.groups).movedim(1, 0)
    torch.testing.assert_close(made, wanted)


def test_pieces_are_bounded_and_the_same(monkeypatch):
    x, shape = torch.randn(5, 3, 12, 10), Geometry.of((3, 3), 1, 1, 1)
    whole = torch.cat(list(patches(x, shape)), 1)
    for numbers in (60, 600, 2000):
        monkeypatch.setattr(rooms, "_NUMBERS", numbers)
        pieces = list(patches(x, shape))
        assert torch.equal(torch.cat(pieces, 1), whole)
        assert max(piece.numel() for piece in pieces) <= max(numbers, 27 * 10)  # a row of the map at least


def test_of_a_large_map_some_positions_in_odd_steps():
    x = torch.arange(200 * 200.0).view(1, 1, 200, 200)
    (rows,) = patches(x, Geometry.of((1, 1), 1, 0, 1))
    found = rows.view(-1)
    assert 1024 <= len(found) < 200 * 200 / 4
    columns = (found % 200).unique().diff().unique()
    assert columns.tolist() == [5]


def test_no_examples():
    for layer, shape in CONVOLUTIONS.values():
        if len(shape) == layer.weight.ndim:
            for part in patches(torch.zeros(0, *shape[1:]), geometry(layer)):
                assert part.shape[:2] == (layer.groups, 0)
