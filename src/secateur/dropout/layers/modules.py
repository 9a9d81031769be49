"""Dropout layers that people keep rewriting: each a small module, the identity in `eval()`.

Their noise comes from `secateur.dropout.noise`: `sample` finds it in a model that stays in `eval()`. All run under
`torch.compile` without a graph break.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from secateur.dropout import noise
from secateur.dropout.layers.recurrent import locked
from secateur.errors import InputError, InputTypeError
from secateur.sparsity import fraction, half_up
from secateur.support import checks

__all__ = ["DropBlock2d", "DropConnect", "LockedDropout", "StochasticDepth", "TargetedDropout", "WordDropout"]

_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)


class LockedDropout(nn.Module):
    """Dropout with one mask for each sequence, the same at every time step (variational dropout).

    Takes and gives `[time, batch, features]`, `[batch, time, features]` if `batch_first`, `[time, features]` for one
    sequence, or a PackedSequence of `[sum of lengths, features]`.

    Args:
        p: probability that a feature of a sequence is dropped, 0 <= p < 1; the others are divided by 1 - p.
        batch_first: where the batch is.

    Raises:
        InputError: a rate outside [0, 1); a tensor of another number of dimensions.

    Sources: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    section 4; Merity, Keskar & Socher 2018, "Regularizing and Optimizing LSTM Language Models", section 4.2.

    >>> x = LockedDropout(0.5)(torch.ones(20, 3, 8))
    >>> bool((x == x[0]).all())  # the same at every step
    True
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        self.p = noise.require_rate(p)
        checks.flag("batch_first", batch_first)
        self.batch_first = batch_first

    def forward(self, x: _Sequences) -> _Sequences:
        """Drop the same features at every step."""
        if isinstance(x, Tensor):
            _require_dimensions(self, x, (2, 3), "[time, batch, features] or, of one sequence, [time, features]")
        return locked(x, self.p, training=self.training, kind="locked_dropout", batch_first=self.batch_first)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", batch_first=True" if self.batch_first else "")


class WordDropout(nn.Module):
    """Replace random tokens by one id, such as that of the unknown word.

    Takes and gives integers of any shape: it stands before the embedding. Nothing is scaled.

    Args:
        p: probability that a token is replaced, 0 <= p < 1, for each position on its own.
        replacement: the id that is put there.
        keep: ids that are never replaced, such as those of padding and of the ends of a sentence.

    Raises:
        InputError: a rate outside [0, 1); InputTypeError: ids or tokens that are no integers.

    Sources: Bowman et al. 2016, "Generating Sentences from a Continuous Space", section 3.1; Iyyer et al. 2015, "Deep
    Unordered Composition Rivals Syntactic Methods for Text Classification", section 3.1 (which leaves words out).

    >>> WordDropout(0.9, replacement=1, keep=[0])(torch.tensor([[0, 0], [1, 1]]))
    tensor([[0, 0],
            [1, 1]])
    """

    def __init__(self, p: float, replacement: int, *, keep: Sequence[int] = ()) -> None:
        super().__init__()
        self.p = noise.require_rate(p)
        checks.whole("replacement", replacement, 0, "the id of a token, a whole number")
        checks.several("keep", keep, "a list of the ids of tokens")
        self.replacement, self.keep = replacement, tuple(keep)
        for token in self.keep:
            checks.whole("keep", token, 0, "ids of tokens, whole numbers")

    def forward(self, tokens: Tensor) -> Tensor:
        """Replace some."""
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputTypeError(f"WordDropout got {tokens.dtype}: give it the ids of tokens, before the embedding")
        if not noise.active(self.training) or self.p == 0:
            return tokens
        replaced = noise.uniform(tokens, tokens.shape, kind="word_dropout", rate=self.p) < self.p
        for token in self.keep:
            replaced = replaced & (tokens != token)
        return tokens.masked_fill(replaced, self.replacement)

    def extra_repr(self) -> str:
        return f"p={self.p}, replacement={self.replacement}" + (f", keep={list(self.keep)}" if self.keep else "")


class DropConnect(nn.Linear):
    """A Linear layer that drops weights instead of activations; its state_dict is that of `nn.Linear`.

    One mask a pass, shared by the batch: the paper's mask for each example would need a weight matrix for each. The
    bias is kept. Where the paper draws from a normal distribution at inference, `eval()` computes with its mean.

    Args:
        in_features: as in `nn.Linear`: takes `[..., in_features]`.
        out_features: gives `[..., out_features]`.
        bias: have one.
        p: probability that a weight is dropped, 0 <= p < 1; the others are divided by 1 - p.

    Raises:
        InputError: a rate outside [0, 1).

    Source: Wan et al. 2013, "Regularization of Neural Networks using DropConnect", section 3.

    >>> layer = DropConnect(8, 3, p=0.25)
    >>> layer(torch.ones(2, 8)).shape, layer
    (torch.Size([2, 3]), DropConnect(in_features=8, out_features=3, bias=True, p=0.25))
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, p: float = 0.5) -> None:
        rate = noise.require_rate(p)
        _require_sizes(in_features, out_features, bias)
        super().__init__(in_features, out_features, bias)
        self.p = rate

    def forward(self, input: Tensor) -> Tensor:
        """Compute with some of the weights."""
        weight = noise.drop(self.weight, self.p, training=self.training, kind="dropconnect")
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class DropBlock2d(nn.Module):
    """Drop squares of neighbouring activations, different ones in each channel.

    Takes and gives `[batch, channels, height, width]` or `[channels, height, width]`. What is kept of an example is
    divided by the fraction that was kept of it: the mean of its activations stays, whatever else is in the batch.

    Args:
        p: fraction of the activations that is dropped, 0 <= p < 1, if no two squares overlap (eq. 1 of the paper); as
            they do, it is less: with squares of 7 in maps of 28 x 28, 0.094 for p = 0.1 and 0.21 for p = 0.25 on
            average. Activations at the border, which fewer squares reach, are dropped less often.
        size: side of a square, in activations; 1 is dropout.

    Raises:
        InputError: a rate outside [0, 1); a size below 1 or, in training, above that of the map; other dimensions.

    Source: Ghiasi, Lin & Le 2018, "DropBlock: A regularization method for convolutional networks", algorithm 1.

    >>> DropBlock2d(0.1, size=3)(torch.ones(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, p: float, size: int) -> None:
        super().__init__()
        self.p = noise.require_rate(p)
        checks.whole("size", size, 1, "the side of a square in activations, a whole number")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Drop squares."""
        _require_dimensions(self, x, (3, 4), "[batch, channels, height, width] or [channels, height, width]")
        if not noise.active(self.training) or self.p == 0:
            return x
        height, width = x.shape[-2:]
        size = self.size
        if size > min(height, width):
            raise InputError(
                f"squares of {size} x {size} do not fit into maps of {height} x {width}: "
                f"give DropBlock2d a size of at most {min(height, width)}, or put it where maps are larger"
            )
        corners = height - size + 1, width - size + 1  # where the upper left of a square may be
        gamma = self.p * (height * width) / (size**2 * corners[0] * corners[1])
        numbers = noise.uniform(x, (*x.shape[:-2], *corners), kind="dropblock", rate=self.p)
        squares = F.pad((numbers < gamma).float(), (size - 1,) * 4)
        squares = F.max_pool2d(F.max_pool2d(squares, (size, 1), stride=1), (1, size), stride=1)
        kept = 1 - squares
        share = kept.mean((-3, -2, -1), keepdim=True).clamp(min=1e-9)
        return x * (kept / share).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, size={self.size}"


class StochasticDepth(nn.Module):
    """Drop a whole residual branch, for each example on its own: `x + drop(branch(x))`.

    Args:
        p: probability that the branch, `[batch, ...]`, is dropped, 0 <= p < 1; where it is kept it is divided by 1 - p.
        per_batch: drop it for the whole batch or not at all, as in the paper.

    Raises:
        InputError: a rate outside [0, 1); a tensor without dimensions.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3 (there, eval() multiplies by 1 - p).

    >>> branch, drop = nn.Linear(8, 8), StochasticDepth(0.2)
    >>> x = torch.ones(4, 8)
    >>> (x + drop(branch(x))).shape
    torch.Size([4, 8])
    """

    def __init__(self, p: float, *, per_batch: bool = False) -> None:
        super().__init__()
        self.p = noise.require_rate(p)
        checks.flag("per_batch", per_batch)
        self.per_batch = per_batch

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch whose result is `x`."""
        if x.ndim == 0:
            raise InputError("StochasticDepth got a tensor without dimensions: give it [batch, ...]")
        shape = (1 if self.per_batch else x.shape[0], *(1,) * (x.ndim - 1))
        return noise.drop(x, self.p, training=self.training, kind="stochastic_depth", shape=shape)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", per_batch=True" if self.per_batch else "")


class TargetedDropout(nn.Linear):
    """A Linear layer that drops its smallest weights only, so that it learns to do without them: train, then prune.

    In each row of the weight (of one output) the `target` fraction of smallest magnitude is found anew at each pass,
    and each of these is dropped with probability `p`; one mask a pass, shared by the batch. Nothing is scaled, as in
    the paper: the model that counts is the pruned one, whose other weights have just this size, and dividing by 1 - p
    would blow small weights up, a hundredfold at a rate of 0.99. Hence `eval()` before pruning is not the mean of
    training. The state_dict is that of `nn.Linear`; the bias is kept.

    Args:
        in_features: as in `nn.Linear`: takes `[..., in_features]`.
        out_features: gives `[..., out_features]`.
        bias: have one.
        p: probability that a targeted weight is dropped, 0 <= p < 1.
        target: fraction of the weights of each row, or if `units` of the rows; 0 < target <= 1. Halves are rounded up.
        units: target whole rows, those of smallest L2 norm.

    Raises:
        InputError: a rate outside [0, 1), a target outside (0, 1].

    Source: Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout", section 4.

    >>> layer = TargetedDropout(8, 3, p=0.9, target=0.5)
    >>> layer(torch.ones(2, 8)).shape, layer.targets().sum(1)
    (torch.Size([2, 3]), tensor([4, 4, 4]))
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, p: float, target: float, units: bool = False
    ) -> None:
        rate = noise.require_rate(p)
        _require_sizes(in_features, out_features, bias)
        checks.flag("units", units)
        checks.number("target", target, "the fraction of weights that may be dropped, such as 0.5")
        if not 0 < target <= 1:
            raise InputError(
                f"target is {target}: give the fraction of weights that may be dropped, above 0 and at most 1"
            )
        super().__init__(in_features, out_features, bias)
        self.p, self.target, self.units = rate, float(target), units
        self._count = half_up(fraction(self.target) * (out_features if units else in_features))

    def targets(self) -> Tensor:
        """Tell which weights may be dropped now: bool, of the weight's shape, True for a target."""
        weight = self.weight.detach()
        sizes = torch.linalg.vector_norm(weight, dim=1, keepdim=True).T if self.units else weight.abs()
        lowest = sizes.topk(self._count, dim=1, largest=False).indices
        found = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, lowest, True)
        return found.T.expand_as(weight) if self.units else found

    def forward(self, input: Tensor) -> Tensor:
        """Compute without some of the smallest weights."""
        weight: Tensor = self.weight
        if noise.active(self.training) and self.p > 0:
            shape = (self.out_features, 1 if self.units else self.in_features)
            numbers = noise.uniform(weight, shape, kind="targeted_dropout", rate=self.p)
            weight = weight.masked_fill(self.targets() & (numbers < self.p), 0)
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, target={self.target}" + (", units=True" if self.units else "")


def _require_dimensions(layer: nn.Module, x: Tensor, allowed: Sequence[int], shapes: str) -> None:
    if x.ndim not in allowed:
        raise InputError(f"{type(layer).__name__} got a tensor of shape {tuple(x.shape)}: give it {shapes}")


def _require_sizes(in_features: int, out_features: int, bias: bool) -> None:
    checks.whole("in_features", in_features, 0, "the number of inputs")
    checks.whole("out_features", out_features, 0, "the number of outputs")
    checks.flag("bias", bias)
