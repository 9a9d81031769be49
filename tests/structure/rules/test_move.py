import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.structure.rules.move import dims_of, factors


class Net(nn.Module):
    """A function of 16 hidden units between two Linears."""

    def __init__(self, function, width=16):
        super().__init__()
        self.a, self.c, self.function = nn.Linear(6, 16), nn.Linear(width, 3), function

    def forward(self, x):
        return self.c(self.function(self.a(x)))


def width(function, out=16, sparsity=0.5):
    torch.manual_seed(0)
    return sc.shrink(Net(function, out).eval(), torch.randn(4, 6), sparsity).a.out_features


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.t().contiguous().t(),
        lambda y: y.unsqueeze(1).expand(-1, 3, -1).sum(1),
        lambda y: torch.cat([y.flip(-1)], 1),
        lambda y: torch.cat([y, y[:, :0]], 1),
        lambda y: torch.stack(y.chunk(2, -1), 1).flatten(1),
        lambda y: y.unflatten(-1, (4, -1)).transpose(1, 2).flatten(1).relu(),
        lambda y: torch.cat([y[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2]], 1),
    ],
)
def test_labels_move_with_the_data(function):
    assert width(function) == 8


@pytest.mark.parametrize("function", [lambda y: y.repeat(1, 2), lambda y: y.repeat_interleave(2, 1)])
def test_copies_go_together(function):
    assert width(function, 32) == 8


@pytest.mark.parametrize("function", [lambda y: y.roll(1, -1), lambda y: y[:, torch.randperm(16)]])
def test_what_mixes_positions_is_held(function):
    with pytest.raises(sc.errors.StructureError, match=r"roll|getitem"):
        width(function)


def test_equal_parts_stay_equal():
    small = width(lambda y: y.view(len(y), 2, -1)[:, 0].repeat(1, 2) + y)
    assert small % 2 == 0


@pytest.mark.parametrize("step", [2, 4])
def test_neighbours_go_together_where_every_kth_is_taken(step):
    """Every second of what stays would be others than every second that stays."""
    y = torch.arange(16)

    def weave(y):
        return torch.stack([y[:, k::step] for k in range(step)], -1).flatten(1)

    assert torch.equal(weave(y[None])[0], y)
    assert width(weave) == 8
    kept = sc.structure.propose(Net(weave).eval(), torch.randn(4, 6), 0.5).kept["a.weight"][0]
    assert [k // step for k in kept[::step]] == [k // step for k in kept[step - 1 :: step]]


def test_dims():
    assert dims_of(None, 3) == {0, 1, 2}
    assert dims_of((-1, 0), 3) == {0, 2}


def test_factors_of_a_view():
    assert list(factors((2, 12), (2, 3, 4)))[:2] == [([0], [0]), ([1], [1, 2])]


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.cat([y[:, None], y[:, None].relu()], 1).sum(1),
        lambda y: torch.cat([torch.zeros(4, 1, y.shape[1]), y[:, None]], 1).sum(1) + y,
        lambda y: torch.cat([y, y.sum(1, keepdim=True)], 1)[:, :-1],
    ],
)
def test_parts_side_by_side_share_the_other_dimensions(function):
    assert width(function) == 8


def test_windows_of_each_channel_go_with_it():
    torch.manual_seed(0)

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 16, 1), nn.Linear(16 * 9, 3)

        def forward(self, x):
            return self.c(F.unfold(self.a(x), 3, padding=1).transpose(1, 2))

    small = sc.shrink(Windows().eval(), torch.randn(2, 3, 5, 5), 0.5)
    assert small.a.out_channels == 8
    assert small.c.in_features == 72


@pytest.mark.parametrize("at", [[0], [-1]])
def test_a_list_of_one_position_picks_as_a_slice_does(at):
    assert width(lambda y: y * y[:, at]) == 8


@pytest.mark.parametrize("at", [[3], [0, 1], [[0]]])
def test_other_positions_that_are_picked_stay_where_they_are(at):
    with pytest.raises(sc.errors.StructureError, match="nothing can be removed"):
        width(lambda y: y * y[:, at].sum(1).flatten()[:, None])


def test_heads_of_queries_beside_one_of_keys_and_one_of_values():
    class Fused(nn.Module):
        """Falcon's: [.., heads + 2, size]."""

        def __init__(self):
            super().__init__()
            self.heads, self.a, self.c = 4, nn.Linear(5, 48), nn.Linear(32, 3)

        def forward(self, x):
            qkv = self.a(x).view(*x.shape[:2], self.heads + 2, 8).transpose(1, 2) * torch.arange(1.0, 9)
            y = F.scaled_dot_product_attention(qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])
            return self.c(y.transpose(1, 2).flatten(2))

    small = sc.shrink(Fused().eval(), torch.randn(2, 6, 5), 0.5)
    assert (small.heads, small.a.out_features, small.c.in_features) == (2, 32, 16)
