import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc


class Recurrent(nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.rnn, self.fc = layer, nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_recurrent_layers(kind, options):
    torch.manual_seed(0)
    ways = 1 + options.get("bidirectional", False)
    small = sc.shrink(Recurrent(kind(6, 16, **options), 16 * ways).eval(), torch.randn(7, 2, 6), 0.5)
    assert small.rnn.hidden_size == 8
    assert small(torch.randn(3, 1, 6)).shape == (3, 1, 3)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_lstm():
    small = sc.shrink(Recurrent(nn.LSTM(6, 16, proj_size=8), 8).eval(), torch.randn(7, 2, 6), 0.5)
    assert (small.rnn.hidden_size, small.rnn.proj_size, small.fc.in_features) == (8, 4, 4)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.fc = kind(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            h = None
            for one in x:
                h = self.cell(one, h)
            return self.fc(h[0] if isinstance(h, tuple) else h)

    small = sc.shrink(Loop().eval(), torch.randn(4, 2, 6), 0.5)
    assert small.cell.hidden_size == 8
    assert small.cell.weight_hh.shape[1] == 8


class Attention(nn.Module):
    def __init__(self, heads=4, each=8, kv=4):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, n * each) for n in (heads, kv, kv))
        self.out, self.each = nn.Linear(heads * each, 3), each

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.each)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kv", [4, 2])
def test_heads_go_whole(kv):
    torch.manual_seed(0)
    small = sc.shrink(Attention(kv=kv).eval(), torch.randn(2, 5, 6), 0.5)
    assert small.each == 8
    assert small.q.out_features == 16
    assert small.k.out_features == kv * 4


def test_packed_attention():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mha, self.c = (
                nn.Linear(6, 32),
                nn.MultiheadAttention(32, 4, batch_first=True),
                nn.Linear(32, 3),
            )

        def forward(self, x):
            y = self.a(x)
            return self.c(self.mha(y, y, y, need_weights=False)[0])

    small = sc.shrink(Packed().eval(), torch.randn(2, 5, 6), 0.5)
    assert (small.mha.embed_dim, small.mha.num_heads, small.mha.head_dim) == (16, 2, 8)


def test_gated_units():
    model = nn.Sequential(nn.Linear(6, 32), nn.GLU(), nn.Linear(16, 3)).eval()
    small = sc.shrink(model, torch.randn(2, 6), 0.5)
    assert (small[0].out_features, small[2].in_features) == (16, 8)
