"""Models of the benchmarks of dropout: dropout in the places where people put it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc


class Cnn(nn.Module):
    """Two convolutions and a head, on images of 28 x 28; dropout in the head, or after the convolutions too."""

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        spatial = nn.Dropout2d(0.1) if everywhere else nn.Identity()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), spatial,
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


class Lstm(nn.Module):
    """Two layers over 50 steps of 64 features, and a head."""

    def __init__(self, *, hidden: int = 256, first: float = 0.0, inner: float = 0.0, head: float = 0.0) -> None:
        super().__init__()
        self.first, self.drop = nn.Dropout(first), nn.Dropout(head)
        self.lstm = nn.LSTM(64, hidden, 2, batch_first=True, dropout=inner)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.lstm(self.first(x))[0][:, -1]))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Six encoder layers of 256 with four heads, over 64 steps; dropout in all of them, or in the last one only."""

    def __init__(self, *, everywhere: bool) -> None:
        super().__init__()
        rates = [0.1 if everywhere or i == 5 else 0.0 for i in range(6)]
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(256, 4, 1024, rate, batch_first=True) for rate in rates)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Eight residual blocks of convolutions with Dropout2d, and a branch that reads a value."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout2d(0.1))
            for _ in range(8)
        )
        self.head, self.reads = nn.Linear(32, 10), reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
            if self.reads and bool(x.isnan().any()):
                raise ValueError("NaN")
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )


def mlp() -> nn.Module:
    layers = [(nn.Dropout(0.2), nn.Linear(784 if i == 0 else 512, 512), nn.ReLU()) for i in range(3)]
    return nn.Sequential(*(part for layer in layers for part in layer), nn.Dropout(0.5), nn.Linear(512, 10))


def logits(answer: Any) -> Tensor:
    return answer.logits if hasattr(answer, "logits") else answer  # type: ignore[no-any-return]


Case = tuple[str, Callable[[], nn.Module], Callable[[int], Any], tuple[int, ...], str]


def images(*size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *size)


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 30000, (batch, 32))}


CASES: list[Case] = [
    ("CNN, dropout in the head", Cnn, images(1, 28, 28), (1, 32), "10 / 7"),
    ("LSTM 2x256, dropout before the head", lambda: Lstm(head=0.5), images(50, 64), (1, 32), "25 / 30"),
    ("LSTM 2x256, dropout between its layers", lambda: Lstm(inner=0.3), images(50, 64), (1, 4), "4 / 2.5"),
    ("LSTM 2x128, dropout between its layers", lambda: Lstm(hidden=128, inner=0.3), images(50, 64), (1, 4), "4 / 2.5"),
    ("transformer, dropout in the last layer", lambda: Transformer(everywhere=False), images(64, 256), (1,), "4"),
    ("transformer, dropout everywhere", lambda: Transformer(everywhere=True), images(64, 256), (1, 4), "0.95"),
    ("BERT 6 x 384, dropout everywhere", bert, tokens, (1, 4), "0.95"),
    ("CNN, dropout everywhere", lambda: Cnn(everywhere=True), images(1, 28, 28), (1, 32), "0.95"),
    ("residual CNN, dropout everywhere", Residual, images(3, 32, 32), (1, 16), "0.95"),
    ("the same, which reads a value", lambda: Residual(reads=True), images(3, 32, 32), (1, 16), "0.95"),
    ("LSTM 2x256, dropout on its inputs", lambda: Lstm(first=0.2), images(50, 64), (1, 32), "0.95"),
    ("MLP, dropout everywhere", mlp, images(784), (1, 32, 512), "0.95"),
]


class Functional(nn.Module):
    """Dropout called as a function, and inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(64, 192), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(functional.dropout(x, 0.1, self.training)).chunk(3, -1)
        rate = 0.2 if self.training else 0.0
        hidden = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        return self.head(torch.dropout(hidden, 0.1, self.training).mean(1))  # type: ignore[no-any-return]


class Unseen(nn.Module):
    """Noise that no handler reaches in `eval()`."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        if self.training:
            x = functional.dropout(x, 0.5) * (torch.rand_like(x) > 0.1)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def recurrent() -> nn.Module:
    model = Lstm(inner=0.3)
    sc.dropout.recurrent(model, hidden=0.25)
    return model


def concrete() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sc.dropout.concrete(model, n_data=100)
    return model


FOUND: list[tuple[str, Callable[[], nn.Module], Callable[[int], Any]]] = [
    *((name, build, make) for name, build, make, _, _ in CASES),
    ("functions and attention", Functional, images(50, 64)),
    ("noise out of reach", Unseen, images(50, 64)),
    ("recurrent", recurrent, images(50, 64)),
    ("concrete", concrete, images(64)),
]
"""Models in which `find` lists the calls."""
