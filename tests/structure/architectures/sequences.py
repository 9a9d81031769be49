"""Linear networks, other ways to mix a sequence, and code that the data steers."""

import torch
import torch.nn.functional as F
from torch import nn

from structure.architectures import architecture


@architecture
def perceptron(w):
    body = nn.Linear(20, w(64)), nn.ReLU(), nn.Linear(w(64), w(48)), nn.Tanh()
    return nn.Sequential(*body, nn.Linear(w(48), 10)), (torch.randn(4, 20),)


@architecture
def tied_bag_of_words(w):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(60, w(16)), nn.Linear(w(16), w(32)), nn.Linear(w(32), w(16))
            self.out = nn.Linear(w(16), 60, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.down(torch.tanh(self.up(self.embed(x).mean(1)))))

    return Bag(), (torch.randint(0, 60, (2, 6)),)


@architecture
def branch_on_data(w):
    class Steered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, w(32)), nn.Linear(w(32), w(32)), nn.Linear(w(32), 3)

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.c(F.relu(self.b(y)) if y.mean() > -1 else y)

    return Steered(), (torch.randn(4, 10),)


@architecture
def mixer(w):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(12, w(24)), nn.Linear(w(24), 4)
            self.norms = nn.ModuleList(nn.LayerNorm(w(24)) for _ in range(2))
            self.times = nn.Sequential(nn.Linear(6, w(16)), nn.GELU(), nn.Linear(w(16), 6))
            self.widths = nn.Sequential(nn.Linear(w(24), w(48)), nn.GELU(), nn.Linear(w(48), w(24)))

        def forward(self, x):
            x = self.first(x)
            x = x + self.times(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
            return self.out(x + self.widths(self.norms[1](x)))

    return Mixer(), (torch.randn(2, 6, 12),)


@architecture
def handwritten_norm(w):
    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

        def forward(self, x):
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
            return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias

    body = nn.Linear(10, w(24)), Norm(w(24)), nn.Linear(w(24), w(32)), nn.GELU(), nn.Linear(w(32), 4)
    return nn.Sequential(*body), (torch.randn(4, 10),)


@architecture(least=0.0)
def fourier_mixing(w):
    """The transform along the width needs all of it; the inner layer is free."""

    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(12, w(16)), nn.Linear(w(16), 4)
            self.up, self.down = nn.Linear(w(16), w(64)), nn.Linear(w(64), w(16))

        def forward(self, x):
            x = self.first(x)
            x = x + torch.fft.fft2(x, dim=(-2, -1)).real
            return self.out(x + self.down(F.gelu(self.up(x))))

    return Fourier(), (torch.randn(2, 6, 12),)


@architecture(least=0.0)
def units_picked_by_data(w):
    """The largest units of one layer are picked: none of them may go; the next layers are free."""

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, w(24)), nn.Linear(4, w(32)), nn.Linear(w(32), 3)

        def forward(self, x):
            y = self.a(x)
            best = y.abs().sum(0).argsort(descending=True)[:4]
            return self.c(F.relu(self.b(y[:, best])))

    return Picked(), (torch.randn(4, 10),)


@architecture
def gated_linear_unit(w):
    body = nn.Linear(10, 2 * w(16)), nn.GLU(), nn.Linear(w(16), 2 * w(24)), nn.GLU(), nn.Linear(w(24), 4)
    return nn.Sequential(*body), (torch.randn(4, 10),)


@architecture
def one_layer_used_twice(w):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.out = nn.Linear(10, w(32)), nn.Linear(w(32), w(32)), nn.Linear(w(32), 4)

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                x = torch.tanh(self.again(x))
            return self.out(x)

    return Shared(), (torch.randn(4, 10),)


@architecture
def bilinear_scores(w):
    """Two towers whose outputs are compared."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.users = nn.Sequential(nn.Embedding(30, w(16)), nn.Linear(w(16), w(24)))
            self.items = nn.Sequential(nn.Embedding(30, w(16)), nn.Linear(w(16), w(24)))

        def forward(self, users, items):
            return (self.users(users) * self.items(items)).sum(-1)

    return Towers(), (torch.randint(0, 30, (5,)), torch.randint(0, 30, (5,)))


@architecture
def selective_scan(w):
    """A linear recurrence whose gates depend on the input, with a causal depthwise convolution before it."""

    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            inner = w(24)
            self.first, self.conv = nn.Linear(12, 2 * inner), nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
            self.step, self.decay = nn.Linear(inner, inner), nn.Parameter(torch.rand(inner, 4))
            self.inside, self.outside = nn.Linear(inner, 4), nn.Linear(inner, 4)
            self.last = nn.Linear(inner, 4)

        def forward(self, x):
            x, gate = self.first(x).chunk(2, -1)
            x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
            step, b, c = F.softplus(self.step(x)), self.inside(x), self.outside(x)
            state, outs = x.new_zeros(len(x), x.shape[2], 4), []
            for t in range(x.shape[1]):
                keep = torch.exp(-step[:, t, :, None] * self.decay.exp())
                state = keep * state + (step[:, t] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
                outs.append((state * c[:, t].unsqueeze(1)).sum(-1))
            return self.last(torch.stack(outs, 1) * F.silu(gate))

    return Scan(), (torch.randn(2, 5, 12),)


@architecture
def temporal_convolutions(w):
    """Dilated causal convolutions with skips that are summed at the end."""

    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv1d(3, w(16), 1)
            self.gates = nn.ModuleList(nn.Conv1d(w(16), 2 * w(16), 2, dilation=2**k) for k in range(3))
            self.skips = nn.ModuleList(nn.Conv1d(w(16), w(24), 1) for _ in range(3))
            self.back = nn.ModuleList(nn.Conv1d(w(16), w(16), 1) for _ in range(3))
            self.out = nn.Conv1d(w(24), 4, 1)

        def forward(self, x):
            x, total = self.first(x), 0
            for k, (gates, skip, back) in enumerate(zip(self.gates, self.skips, self.back, strict=True)):
                a, b = gates(F.pad(x, (2**k, 0))).chunk(2, 1)
                y = torch.tanh(a) * torch.sigmoid(b)
                total, x = total + skip(y), x + back(y)
            return self.out(F.relu(total))

    return Wave(), (torch.randn(2, 3, 12),)


@architecture
def graph_convolutions(w):
    """Neighbours are summed with `index_add`."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.ModuleList([nn.Linear(6, w(24)), nn.Linear(w(24), w(24))])
            self.near = nn.ModuleList([nn.Linear(6, w(24)), nn.Linear(w(24), w(24))])
            self.out = nn.Linear(w(24), 3)

        def forward(self, x, edges):
            for own, near in zip(self.own, self.near, strict=True):
                message = near(x)[edges[0]]
                total = message.new_zeros(len(x), message.shape[1]).index_add(0, edges[1], message)
                x = F.relu(own(x) + total)
            return self.out(x.mean(0))

    return Graph(), (torch.randn(5, 6), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))


@architecture
def words_by_convolution(w):
    class TextCNN(nn.Module):
        """Kim 2014: kernels as wide as the embedding."""

        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, w(8)), nn.Linear(3 * w(10), 4)
            self.convs = nn.ModuleList(nn.Conv2d(1, w(10), (k, w(8))) for k in (2, 3, 4))

        def forward(self, x):
            x = self.embed(x).unsqueeze(1)
            parts = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
            return self.out(torch.cat([F.max_pool1d(p, p.size(2)).squeeze(2) for p in parts], 1))

    return TextCNN(), (torch.randint(0, 20, (2, 7)),)


@architecture
def gated_perceptron(w):
    class Gated(nn.Module):
        """gMLP, Liu et al. 2021: a convolution over the words of all channels alike."""

        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(20, w(12)), nn.Linear(w(12), w(32)), nn.Linear(w(16), w(12))
            self.norm, self.times, self.out = nn.LayerNorm(w(16)), nn.Conv1d(6, 6, 1), nn.Linear(w(12), 20)

        def forward(self, x):
            x = self.embed(x)
            a, b = F.gelu(self.up(x)).chunk(2, -1)
            return self.out(x + self.down(a * self.times(self.norm(b))))

    return Gated(), (torch.randint(0, 20, (2, 6)),)


@architecture(limit=1e-6)  # arange times a complex number is in single precision
def state_space_by_spectra(w):
    class StateSpace(nn.Module):
        """S4D, Gu et al. 2022: a long convolution, by Fourier transforms over time."""

        def __init__(self):
            super().__init__()
            self.up, self.mix, self.out = nn.Linear(6, w(12)), nn.Conv1d(w(12), 2 * w(12), 1), nn.Linear(w(12), 3)
            self.step, self.skip = nn.Parameter(torch.rand(w(12))), nn.Parameter(torch.randn(w(12)))
            self.decay, self.turn = nn.Parameter(torch.rand(w(12), 4)), nn.Parameter(torch.rand(w(12), 4))
            self.read = nn.Parameter(torch.randn(w(12), 4, 2))

        def forward(self, x):
            u = self.up(x).transpose(1, 2)
            length = u.shape[-1]
            a = (1j * self.turn - torch.exp(self.decay)) * torch.exp(self.step)[:, None]
            powers = torch.exp(a.unsqueeze(-1) * torch.arange(length))
            kernel = torch.einsum("hn,hnl->hl", torch.view_as_complex(self.read) * (torch.exp(a) - 1), powers).real
            y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)
            y = y[..., :length] + u * self.skip.unsqueeze(-1)
            return self.out(F.glu(self.mix(F.gelu(y)), 1).transpose(1, 2))

    return StateSpace(), (torch.randn(2, 8, 6),)
