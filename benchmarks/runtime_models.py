"""Models in the shape of known ones, with random weights, in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to the input or to its 1 x 1 convolution."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.downsample = nn.Identity()
        if inputs != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(found + self.downsample(x))  # type: ignore[no-any-return]


def resnet18() -> nn.Sequential:
    """ResNet-18 (He et al. 2015): images [batch, 3, height, width] to 1000 logits."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = (Residual(a, b, 1 if a == b else 2) for a, b in pairwise(widths))
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Decoder(nn.Module):
    """A layer of a Llama, but for the rotation of positions: attention of 64 wide heads, and a gated SiLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        q, k, v = (part(normed).unflatten(-1, (-1, 64)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        normed = self.between(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """333 million weights: token ids [batch, tokens] to logits [batch, tokens, 12288]."""

    def __init__(self, layers: int = 24, width: int = 1024, inner: int = 2816, vocabulary: int = 12288) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Decoder(width, inner) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


if __name__ == "__main__":
    for model in (resnet18(), Llama()):
        print(type(model).__name__, sum(p.numel() for p in model.parameters()) / 1e6, "million weights")
    print(resnet18().eval()(torch.zeros(1, 3, 64, 64)).shape)
