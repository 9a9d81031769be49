"""Models whose states are saved, and how to see that nothing about them changed."""

import contextlib
import warnings

import torch
from torch import nn

import secateur as sc
from models import MODELS, Mlp, build, same


class Recurrent(nn.Module):
    """LSTM and GRU, both ways, with a projection, in cells."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(20, 24, 2, bidirectional=True, proj_size=8)
        self.gru = nn.GRU(16, 20, bidirectional=True)
        self.cell = nn.GRUCell(20, 20)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]

    @staticmethod
    def example(generator):
        return torch.randn(5, 3, 20, generator=generator)


class Shared(nn.Module):
    """One Linear under two names, between weights tied in three."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 20, padding_idx=0)
        self.first = nn.Linear(20, 20)
        self.again = self.first
        self.decoder = nn.Linear(20, 40, bias=False)
        self.other = nn.Linear(20, 40)
        self.decoder.weight = self.other.weight = self.embed.weight

    def forward(self, tokens):
        inner = self.again(self.first(self.embed(tokens)).relu())
        return self.decoder(inner) + self.other(inner)

    @staticmethod
    def example(generator):
        return torch.randint(0, 40, (4, 7), generator=generator)


class Odd(nn.Module):
    """Parameters and buffers of all dtypes, sizes and strides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(16)
        self.across = nn.Parameter(torch.randn(30, 20).t())
        self.every_other = nn.Parameter(torch.randn(40, 40)[::2, 1::2])
        self.brain = nn.Parameter(torch.randn(20, 20).to(torch.bfloat16))
        self.twice = nn.Parameter(torch.randn(20, 20).double())
        self.waves = nn.Parameter(torch.randn(20, 20, dtype=torch.complex64))
        self.finer = nn.Parameter(torch.randn(20, 20, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.register_buffer("no_rows", torch.zeros(0, 5))
        self.frozen = nn.Parameter(torch.randn(20, 20), requires_grad=False)
        self.register_buffer("mask", torch.randn(20, 20) > 0)
        self.register_buffer("steps", torch.tensor(12))
        self.register_buffer("index", torch.arange(1000))
        self.register_buffer("small", torch.arange(-100, 100, dtype=torch.int8).repeat(3))
        self.register_buffer("eight", torch.randn(20, 20).to(torch.float8_e4m3fn))
        self.register_buffer("powers", torch.arange(100, 200, dtype=torch.uint8).repeat(4).view(torch.float8_e8m0fnu))
        self.register_buffer("four", torch.arange(256, dtype=torch.uint8).repeat(2).view(torch.float4_e2m1fn_x2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.scale

    @staticmethod
    def example(generator):
        return torch.randn(2, 8, 6, 6, generator=generator)


class Wide(Mlp):
    """An Mlp whose weights are worth packing."""

    def __init__(self, hidden=40, outputs=10):
        super().__init__(40, hidden, outputs)


ZOO = [*MODELS, Recurrent, Shared, Odd]


def pruned(kind, seed=0):
    model = build(kind, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.errors.SecateurWarning)
        sc.prune(model, 0.9)
    return model.eval()


def face(model):
    """All that must not change when weights are filled in."""
    return [
        [(n, id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad, t.is_leaf) for n, t in named]
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    ] + [[id(w) for w in m._flat_weights] for m in model.modules() if isinstance(m, nn.RNNBase)]


@contextlib.contextmanager
def unchanged(model, folder):
    """See that neither a model nor a folder is other than before."""
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else dict(model)
    held = {name: tensor for name, tensor in state.items() if type(tensor) in (torch.Tensor, nn.Parameter)}
    held = {n: t for n, t in held.items() if t.layout is torch.strided and not (t.is_meta or t.is_quantized)}
    before = {n: (t.detach().clone(), None if t.is_inference() else t._version, id(t)) for n, t in held.items()}
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield
    for name, (value, version, identity) in before.items():
        now = held[name]
        assert same(value, now), name
        assert (None if now.is_inference() else now._version, id(now)) == (version, identity), name
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
