"""The models of benchmarks/structure.py whose speed and accuracy are told: built at any width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.c, self.d = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.short = nn.Identity() if stride == 1 and i == o else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.d(self.b(F.relu(self.c(self.a(x))))) + self.short(x))


def resnet(widths: tuple[int, ...], channels: int = 3, stride: int = 1) -> nn.Module:
    blocks = []
    for k, (i, o) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        blocks += [Block(i, o, 2 if k else 1), Block(o, o, 1)]
    stem = nn.Conv2d(channels, widths[0], 3, stride, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Recurrent(nn.Module):
    """Reads an image row by row, or a sequence."""

    def __init__(self, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(size, hidden, layers, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(x.flatten(0, -3) if x.ndim == 4 else x)[0][:, -1])
        return out


class Attentive(nn.Module):
    """A transformer over rows or a sequence."""

    def __init__(self, size: int, width: int, inner: int, layers: int, time: int) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(size, width), nn.Parameter(torch.randn(1, time, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 8, inner, 0.0, batch_first=True)
        self.body, self.out = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -3) if x.ndim == 4 else x
        out: Tensor = self.out(self.body(self.first(x) + self.place).mean(1))
        return out
