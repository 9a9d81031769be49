"""Small real models, their data and a loop to train them; free of secateur, so that fresh processes import it too."""

import math
from fractions import Fraction

import torch
from torch import nn


class Tagger(nn.Module):
    """Two LSTM layers, both ways, between an Embedding with a padding row and a Linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])

    @staticmethod
    def example(generator):
        return torch.randint(0, 20, (4, 7), generator=generator)


class Net(nn.Module):
    """Conv, BatchNorm, a strided and a grouped conv, a transposed one, Linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, images):
        return self.head(self.up(self.down(self.norm(self.conv(images)).relu()).relu()).flatten(1))

    @staticmethod
    def example(generator):
        return torch.randn(4, 3, 8, 8, generator=generator)


class Attention(nn.Module):
    """A transformer layer, and an attention of other key and value sizes (q, k and v projections apart)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        seen = x[..., :8]
        return self.head(self.cross(self.layer(x), seen, seen, need_weights=False)[0])

    @staticmethod
    def example(generator):
        return torch.randn(4, 6, 16, generator=generator)


class LanguageModel(nn.Module):
    """An Embedding tied to its decoder, around an LSTM."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.decoder = nn.Linear(8, 30)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens):
        return self.decoder(self.lstm(self.embed(tokens))[0])

    @staticmethod
    def example(generator):
        return torch.randint(0, 30, (4, 7), generator=generator)


class Mlp(nn.Module):
    """Two Linear layers: the plainest model, for the exact arithmetic."""

    def __init__(self, inputs=12, hidden=20, outputs=5):
        super().__init__()
        self.inputs = inputs
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.second(self.first(x).relu())

    def example(self, generator):
        return torch.randn(8, self.inputs, generator=generator)


MODELS = [Tagger, Net, Attention, LanguageModel, Mlp]


def build(kind, seed=0):
    """A model with the same random weights every time, of one size in all layers, so that no layer collapses.

    The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3 / parameter.std())
        return model


def example(model, step=0):
    """The inputs of one step; the same every time."""
    return model.example(torch.Generator().manual_seed(step))


def loss(model, step=0):
    """Outputs drawn towards a wave: every weight gets a gradient."""
    out = model(example(model, step))
    wave = torch.linspace(0, 9, out.numel(), device=out.device).sin().view(out.shape)
    return (out - wave).abs().square().mean()


def train(model, optimizer, steps, first=0):
    """An ordinary loop that knows of no pruning."""
    for step in range(first, first + steps):

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def k(sparsity, size):
    """floor(s N + 1/2), with s as it is written."""
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
    return math.floor(exact * size + Fraction(1, 2))


def zeros(tensors):
    """Zeros in all of some tensors."""
    return sum(int((tensor == 0).sum()) for tensor in tensors.values())


def copies(model):
    """The state of a model, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    """Two nests of dicts, lists and tensors are equal to the bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.detach()
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(right.detach().contiguous().flatten().view(torch.uint8))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right
