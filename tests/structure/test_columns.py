import pytest
import torch
from torch import nn

from secateur.anatomy import Layout
from secateur.calibration.moments import Moments, Piece
from secateur.calibration.statistics import Statistics
from secateur.structure.columns import Readers, damped, input_dims

GENERATOR = torch.Generator().manual_seed(0)


def readers(layer, *, groups=1):
    """A layer by itself, as what reads: of its moments only the shape matters."""
    inputs = layer.weight.numel() // layer.weight.shape[0]
    if isinstance(layer, nn.ConvTranspose2d):
        inputs = layer.in_channels // groups * 9
    outputs = layer.weight.numel() // inputs
    gram = torch.eye(inputs, dtype=torch.float64).expand(groups, -1, -1)
    one = Moments((Piece("weight", 0, outputs),), gram, torch.ones(groups, dtype=torch.int64))
    return Readers(layer, Statistics((one,), {"weight": layer.weight.shape})), one


@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        (Layout(), [1]),
        (Layout("io"), [0]),
        (Layout("gio"), [1]),
        (Layout("gio", groups=2), [0]),
        (Layout("oii"), [1, 2]),
    ],
)
def test_where_inputs_lie_as_stored(layout, dims):
    assert input_dims(layout) == dims


def test_each_column_of_a_kernel_has_what_its_channel_has():
    found, one = readers(nn.Conv2d(4, 6, 3, groups=2), groups=2)
    columns = found.columns(one, {("weight", 1): torch.tensor([5, 7])}, torch.tensor(0))
    assert columns.tolist() == [[5] * 9 + [7] * 9] * 2


def test_groups_of_a_transposed_convolution_read_channels_of_their_own():
    found, one = readers(nn.ConvTranspose2d(4, 6, 3, groups=2), groups=2)
    columns = found.columns(one, {("weight", 0): torch.tensor([1, 2, 3, 4])}, torch.tensor(0))
    assert columns.tolist() == [[1] * 9 + [2] * 9, [3] * 9 + [4] * 9]
    assert found.matrix(one).shape == (2, 3, 18)


def test_tensors_side_by_side_are_one_matrix():
    cell = nn.LSTMCell(3, 2)
    pieces = Piece("weight_ih", 0, 8), Piece("weight_hh", 0, 8)
    one = Moments(pieces, torch.eye(5, dtype=torch.float64)[None], torch.ones(1, dtype=torch.int64))
    found = Readers(cell, Statistics((one,), {}))
    goes = {("weight_hh", 1): torch.tensor([False, True])}
    assert found.columns(one, goes, torch.tensor(False)).tolist() == [[False, False, False, False, True]]
    assert torch.equal(found.matrix(one)[0].float(), torch.cat([cell.weight_ih, cell.weight_hh], 1))


def test_damping_is_a_part_of_the_mean_diagonal():
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert damped(gram).diagonal().tolist() == pytest.approx([1.02, 3.02])
    assert torch.equal(damped(gram * 0), torch.eye(2, dtype=torch.float64))
