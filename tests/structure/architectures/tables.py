"""Graphs, tables and recommendation; memories; and functions that other kinds seldom call."""

import torch
import torch.nn.functional as F
from torch import nn

from structure.architectures import architecture

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 1, 5], [1, 2, 3, 4, 5, 0, 3, 5, 1, 5]])


class GraphAttention(nn.Module):
    """Veličković et al. 2018, with sums over edges as the frameworks write them."""

    def __init__(self, inputs, heads, size):
        super().__init__()
        self.heads, self.size = heads, size
        self.project = nn.Linear(inputs, heads * size, bias=False)
        self.source = nn.Parameter(torch.randn(1, heads, size))
        self.target = nn.Parameter(torch.randn(1, heads, size))
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x, edges):
        z = self.project(x).view(len(x), self.heads, self.size)
        a = (z * self.source).sum(-1)[edges[0]] + (z * self.target).sum(-1)[edges[1]]
        a = F.leaky_relu(a, 0.2).exp()
        total = torch.zeros(len(x), self.heads, dtype=x.dtype).index_add(0, edges[1], a)
        a = a / total[edges[1]]
        out = torch.zeros(len(x), self.heads, self.size, dtype=x.dtype)
        out.index_add_(0, edges[1], z[edges[0]] * a.unsqueeze(-1))
        return out.reshape(len(x), self.heads * self.size) + self.bias


@architecture
def graph_attention(w):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = GraphAttention(5, w(4), 6), GraphAttention(w(4) * 6, w(4), 6)
            self.out = nn.Linear(w(4) * 6, 3)

        def forward(self, x, edges):
            return self.out(F.elu(self.b(F.elu(self.a(x, edges)), edges)))

    return Net(), (torch.randn(6, 5), EDGES)


@architecture
def dot_interactions(w):
    class Recommender(nn.Module):
        """Naumov et al. 2019: bags of words and numbers, and all their products."""

        def __init__(self):
            super().__init__()
            self.bags = nn.ModuleList(nn.EmbeddingBag(12, w(8), mode="sum") for _ in range(3))
            self.bottom = nn.Sequential(nn.Linear(4, w(16)), nn.ReLU(), nn.Linear(w(16), w(8)), nn.ReLU())
            self.top = nn.Sequential(nn.Linear(w(8) + 6, w(16)), nn.ReLU(), nn.Linear(w(16), 1))

        def forward(self, x, words):
            x = self.bottom(x)
            every = torch.stack([x, *(bag(words) for bag in self.bags)], 1)
            i, j = torch.tril_indices(4, 4, -1)
            return self.top(torch.cat([x, (every @ every.transpose(1, 2))[:, i, j]], 1))

    return Recommender(), (torch.randn(3, 4), torch.randint(0, 12, (3, 5)))


@architecture(least=0.7)
def field_attention(w):
    class Interacting(nn.Module):
        """AutoInt, Song et al. 2019: its heads are parts that are split off, so their number stays."""

        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(30, w(12)), nn.Linear(3 * w(12), 1)
            self.q, self.k, self.v, self.r = (nn.Parameter(torch.randn(w(12), w(12)) / 5) for _ in range(4))

        def forward(self, x):
            e = self.embed(x)
            q, k, v, r = (torch.tensordot(e, m, dims=([-1], [0])) for m in (self.q, self.k, self.v, self.r))
            q, k, v = (torch.stack(t.chunk(2, -1)) for t in (q, k, v))
            y = torch.einsum("hbik,hbjk->hbij", q, k).softmax(-1) @ v
            return self.out(F.relu(torch.cat([*y], -1) + r).flatten(1))

    return Interacting(), (torch.randint(0, 30, (4, 3)),)


@architecture
def addressed_memory(w):
    class Memory(nn.Module):
        """Graves et al. 2014: what is read and written is found by likeness."""

        def __init__(self):
            super().__init__()
            self.width, self.hidden = w(8), w(10)
            self.cell, self.key, self.sharp = nn.LSTMCell(4 + w(8), w(10)), nn.Linear(w(10), w(8)), nn.Linear(w(10), 1)
            self.erase, self.add, self.out = nn.Linear(w(10), w(8)), nn.Linear(w(10), w(8)), nn.Linear(w(18), 3)
            self.memory = nn.Parameter(torch.randn(5, w(8)))

        def forward(self, x):
            memory, read = self.memory.expand(len(x), -1, -1), x.new_zeros(len(x), self.width)
            state = x.new_zeros(len(x), self.hidden), x.new_zeros(len(x), self.hidden)
            outs = []
            for step in x.unbind(1):
                state = self.cell(torch.cat([step, read], 1), state)
                alike = F.cosine_similarity(memory, self.key(state[0]).unsqueeze(1), dim=-1)
                at = (F.softplus(self.sharp(state[0])) * alike).softmax(-1).unsqueeze(-1)
                memory = memory * (1 - at * torch.sigmoid(self.erase(state[0])).unsqueeze(1))
                memory = memory + at * self.add(state[0]).unsqueeze(1)
                read = (at.transpose(1, 2) @ memory).squeeze(1)
                outs.append(self.out(torch.cat([state[0], read], 1)))
            return torch.stack(outs, 1)

    return Memory(), (torch.randn(2, 3, 4),)


@architecture
def biaffine_parser(w):
    class Parser(nn.Module):
        """Dozat and Manning 2017."""

        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(20, w(8)), nn.LSTM(w(8), w(8), batch_first=True, bidirectional=True)
            self.head, self.tail = nn.Linear(2 * w(8), w(10)), nn.Linear(2 * w(8), w(10))
            self.arcs, self.kinds = nn.Parameter(torch.randn(w(10), w(10))), nn.Bilinear(w(10), w(10), 4)

        def forward(self, x):
            y, _ = self.lstm(self.embed(x))
            h, t = F.leaky_relu(self.head(y), 0.1), F.leaky_relu(self.tail(y), 0.1)
            return torch.einsum("bxi,ij,byj->bxy", h, self.arcs, t), self.kinds(h, t), torch.cdist(h, t)

    return Parser(), (torch.randint(0, 20, (2, 5)),)
