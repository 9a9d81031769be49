"""Sizes that remember where they were read, and what follows for the shapes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.structure.readings import Reading, marked
from secateur.structure.shrink import shrink

SPARSITIES = [0.3, 0.43, 0.5, 0.7]


class Attention(nn.Module):
    """As timm writes it: the size of the residual is read off x, and used for what the heads give."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Torch(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    def __init__(self, kind, width, heads):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.attention, self.mlp = kind(width, heads), nn.Sequential(nn.Linear(width, 40), nn.GELU())
        self.back = nn.Linear(40, width)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.back(self.mlp(x))).mean(1))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("kind", [Attention, Torch])
def test_residual_and_heads_shrink_together(kind, heads, sparsity):
    torch.manual_seed(0)
    model = Net(kind, 12 * heads, heads).eval()
    small = shrink(model, torch.randn(2, 5, 6), sparsity)
    width, was = small.stem.out_features, 12 * heads
    assert abs(width - was * (1 - sparsity)) <= was / heads / 2 + 1, "to the nearest head"
    assert small.back.out_features == width
    assert small(torch.randn(1, 4, 6)).shape == (1, 3)


class Shared(nn.Module):
    """One attribute makes the views of two layers, of which one is held."""

    def __init__(self):
        super().__init__()
        self.size = 8
        self.stem, self.a, self.b, self.c = nn.Linear(5, 10), nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        a = self.a(x).view(-1, 2, self.size).sum(1)
        b = self.b(x).view(-1, 2, self.size).sum(1)
        return self.c(a), b


def test_one_attribute_for_two_axes_holds_what_the_other_holds():
    """b is an output, so its view keeps its size, and with it that of a."""
    small = shrink(Shared().eval(), torch.randn(4, 5), 0.5)
    assert (small.stem.out_features, small.a.out_features, small.size) == (5, 16, 8)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_directions_of_a_recurrent_layer_keep_one_size_and_units_of_their_own(sparsity):
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 20, 2, bidirectional=True), nn.Linear(40, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    small = shrink(Tagger().eval(), torch.randn(7, 2, 6), sparsity)
    assert small.rnn.hidden_size == round(20 * (1 - sparsity) - 1e-9)
    assert small.out.in_features == 2 * small.rnn.hidden_size


def test_a_reading_is_an_int_whose_products_and_quotients_remember():
    size = Reading(12, "net.width")
    assert [type(n) for n in (size * 3, 3 * size, size // 4)] == [Reading] * 3
    assert ((3 * size).factor, (size // 4).factor) == (3, 0.25)
    assert [type(n) for n in (size // 5, size + 1, size * size, size - 2)] == [int] * 4
    assert torch.zeros(2, size).view(-1, size // 4).shape == (8, 3)
    assert type(copy.deepcopy(size)) is type(pickle.loads(pickle.dumps(size))) is int


def test_attributes_are_plain_again_even_those_that_a_forward_stored():
    model = Net(Attention, 8, 2)
    with marked(model):
        assert type(model.attention.heads) is Reading
        model.attention.last = model.attention.heads
        model.attention.shape = (model.attention.heads, 3)
    assert type(model.attention.heads) is type(model.attention.last) is int
    assert [type(n) for n in model.attention.shape] == [int, int]
