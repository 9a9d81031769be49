import torch
from torch import nn

from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.cut import twin
from secateur.structure.fields import along
from secateur.structure.groups import as_mask
from secateur.structure.policy import Policy
from secateur.structure.remains import Remains, part, size

assert rules


def test_whole_lines_that_go():
    kept = as_mask([True, True, False, True])
    left = part((3, 5), [along(torch.tensor([1, 2, 3]), 2, 0)], kept)
    assert left.shape == (2, 5)
    assert left.lines[0].tolist() == [0, 2]
    assert left.lines[1] is None
    t = torch.arange(15).reshape(3, 5)
    assert torch.equal(left.cut(t), t[[0, 2]])


def test_where_rows_keep_different_positions():
    """[layers, hidden]: both rows keep two of three, but only one position in common."""
    kept = as_mask([True, True, True, False, False, True, True])
    field = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert size((2, 3), [field], kept) == (2, 2)
    assert size((3, 2), [field.T], kept) == (2, 2)
    assert part((2, 3), [field], kept).cut(torch.arange(6).reshape(2, 3)).tolist() == [0, 1, 4, 5]


def test_two_fields_along_one_dimension():
    kept = as_mask([True, True, True, False, True, True, True])
    rows, cells = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 2], [4, 5]])
    assert size((2, 2), [rows, cells], kept) == (1, 2)


def test_sizes_picked_by_data_are_not_expected():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, x):
            y = self.a(x)
            return y[x[:, 0] > 0].relu()

    cap = capture(twin(Picks()), [((torch.tensor([[1.0] * 4, [-1.0] * 4]),), {})], Policy())
    names = {name: axis for _, (name, axis) in cap.home.items()}
    kept = torch.ones(cap.ledger.size, dtype=torch.bool)
    kept[cap.fields(names["a.weight"])[0].flatten()[:2].long()] = False
    kept[cap.fields(names["a.bias"])[0].flatten()[:2].long()] = False
    sizes = Remains(cap.runs[0], kept).sizes
    assert sizes[0] == [(2, 6)]
    assert sizes[-1] == [(-1, 6)]
