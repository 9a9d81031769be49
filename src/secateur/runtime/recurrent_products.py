"""The products of recurrent layers on tensors: all steps of an LSTM, GRU or plain RNN in one call, or one of a cell.

`packed`, `choices` and what falls back to torch's dense kernels are as in `secateur.runtime.products`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.runtime import native, products
from secateur.runtime.layouts import readable

__all__: list[str] = []  # reached through secateur.accelerate alone

KINDS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
"""Modes of torch's recurrent layers, in the order in which the native library counts them."""

LSTM, GRU = 0, 1

_KEPT_FLOATS = 1 << 20  # of what a thread keeps between the layers of its recurrent calls, twice
_room = threading.local()


def recurrent(
    x: Tensor,
    sizes: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    bidirectional: bool,
    kind: int,
    choices: int,
    codes: Sequence[native.Code | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions of a recurrent layer.

    Args:
        x: float32 [steps, batch, features], or [rows of all steps, features] with `sizes`.
        sizes: int64 [steps], the sequences that each step of a packed input still has.
        h: first states [layers * directions, batch, state].
        c: first cells [layers * directions, batch, hidden] of an LSTM, else None.
        weights: as the module's `_flat_weights`.
        packed: for each layer and direction the packed weight_ih (empty: take the dense one), weight_hh and
            (with projections) weight_hr.
        bidirectional: whether every other one of the layers runs backwards.
        kind: which of `KINDS`.
        choices: sparse for these classes of batch; the caller has torch do the others.
        codes: that of each packed matrix; batches of its row classes take it.

    Returns:
        All states [steps, batch, directions * state] (or [rows, ...]), last states, last cells (empty but for an LSTM).
    """
    lib = native.library()
    dense = functools.partial(_dense, x, sizes, h, c, weights, bidirectional, kind)
    if lib is None or not x.numel() or not choices >> products.bucket(h.shape[1]) & 1:
        return dense()
    if choices & products.CHECKED and not _finite(x, h, c):
        return dense()
    layers, directions = h.shape[0], 2 if bidirectional else 1
    per, batch, state = len(weights) // layers, h.shape[1], h.shape[2]
    gates_and_biases = ((weights[i], weights[i + 2 : i + 4]) for i in range(0, len(weights), per) if per >= 4)
    if not all(readable(bias, w_ih.shape[0]) for w_ih, biases in gates_and_biases for bias in biases):
        return dense()
    steps = x.shape[0] if sizes is None else sizes.shape[0]
    if sizes is None:
        sizes = _equal(steps, batch)
    h, c = _own(h), None if c is None else _own(c)
    shape, rows = x.shape[:-1], x.reshape(-1, x.shape[-1]).contiguous()
    counts, threads = (sizes.data_ptr(), steps, batch), torch.get_num_threads()
    first_h, first_c = h.data_ptr(), 0 if c is None else c.data_ptr()
    for first in range(0, layers, directions):
        last = first + directions == layers
        wide = (rows.shape[0], directions * state)
        out = x.new_empty(wide) if last else _between(x, wide, first // directions % 2)
        for i in range(first, first + directions):
            w_ih, _, *rest = weights[i * per : (i + 1) * per]
            ih, hh, *hr = packed[i * len(packed) // layers : (i + 1) * len(packed) // layers]
            biases = rest[:2] if per >= 4 else [None, None]
            bias = biases[0] if kind == GRU or biases[0] is None else biases[0] + biases[1]
            gates = None if ih.numel() else F.linear(rows, w_ih, bias)
            failed = lib.secateur_recurrent(
                kind,
                None if codes is None else _handles(codes[i * len(packed) // layers :][: len(hr) + 2], batch),
                ih.data_ptr() if gates is None else None,
                rows.data_ptr() if gates is None else None,
                bias.data_ptr() if gates is None and bias is not None else None,
                None if gates is None else gates.data_ptr(),
                hh.data_ptr(),
                hr[0].data_ptr() if hr else None,
                *counts,
                biases[1].data_ptr() if kind == GRU and biases[1] is not None else None,
                first_h + i * batch * state * 4,
                None if c is None else first_c + i * batch * c.shape[2] * 4,
                out.data_ptr() + (i - first) * state * 4,
                directions * state,
                i - first,
                threads,
            )
            if failed:
                raise products.failure(failed)
        rows = out
    if choices & products.CHECKED and not _finite(rows, h, c):  # gates were beyond float32
        return dense()
    return rows.view(*shape, -1), h, h.new_empty(0) if c is None else c


def _handles(codes: Sequence[native.Code | None], batch: int) -> Any:
    bit = 1 << products.bucket(batch)
    return (ctypes.c_void_p * 3)(*(code.handle if code is not None and code.choices & bit else None for code in codes))


@functools.lru_cache(64)
def _equal(steps: int, batch: int) -> Tensor:
    """The sizes of all steps of a batch that is not packed."""
    with torch.inference_mode(False):
        return torch.full((steps,), batch, dtype=torch.int64, device="cpu")


def _between(like: Tensor, shape: tuple[int, int], turn: int) -> Tensor:
    """Room for what one layer tells the next; a small one is kept by the thread, as fresh memory costs page faults."""
    if math.prod(shape) > _KEPT_FLOATS:
        return like.new_empty(shape)
    kept: list[Tensor | None] = _room.__dict__.setdefault("kept", [None, None])
    room = kept[turn]
    if room is None or room.numel() < math.prod(shape):
        with torch.inference_mode(False):
            room = kept[turn] = torch.empty(math.prod(shape), device="cpu")
    return room[: math.prod(shape)].view(shape)


def _dense(
    x: Tensor,
    sizes: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    kind: int,
) -> tuple[Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    layers, biases = h.shape[0] // directions, len(weights) // h.shape[0] >= 4
    run: Any = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)[kind]
    hidden: Any = h if c is None else (h, c)
    common = (list(weights), biases, layers, 0.0, False, bidirectional)
    out, *last = run(x, hidden, *common, False) if sizes is None else run(x, sizes, hidden, *common)
    return out, last[0], h.new_empty(0) if c is None else last[1]


def _finite(*tensors: Tensor | None) -> bool:
    return products.finite(*(tensor for tensor in tensors if tensor is not None))


def _own(states: Tensor) -> Tensor:
    return states.clone(memory_format=torch.contiguous_format)


def cell(
    kind: int,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    packed: Sequence[Tensor | None],
    choices: int,
) -> tuple[Tensor, Tensor | None] | None:
    """One step of a cell; None where torch has to do it.

    Args:
        kind: which of `KINDS`.
        x: float32 [batch, features], or [features].
        h: states [batch, hidden], or [hidden]; None for zeros.
        c: cells of an LSTM, as h; else None.
        weights: weight_ih, weight_hh, bias_ih, bias_hh; None for biases that are not there.
        packed: weight_ih (None: take the dense one), weight_hh.
        choices: sparse for these classes of batch.

    Returns:
        The next states, and of an LSTM the next cells.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    ih, hh = packed
    if (lib := native.library()) is None or w_ih is None or w_hh is None or hh is None:
        return None
    try:
        shape, columns, hidden = x.shape, w_ih.shape[1], w_hh.shape[1]
        n, wanted = (shape[0], (shape[0], hidden)) if len(shape) == 2 else (1, (hidden,))
        if n == 0 or not choices >> products.bucket(n) & 1 or shape != (*wanted[:-1], columns):
            return None
        if (b_ih is None) != (b_hh is None) or not readable(b_ih, w_hh.shape[0]) or not readable(b_hh, w_hh.shape[0]):
            return None
        if (h is not None and h.shape != wanted) or (c is not None and c.shape != wanted):
            return None
        if choices & products.CHECKED and not _finite(x, h, c):
            return None
        x, h, c = x.contiguous(), None if h is None else h.contiguous(), None if c is None else c.contiguous()
        given = x.data_ptr(), None if h is None else h.data_ptr(), None if c is None else c.data_ptr()
    except RuntimeError:  # under vmap, nested or not strided
        return None
    source, first_h, first_c = given
    gates = None
    if ih is None:
        gates = F.linear(x, w_ih, b_ih if kind == GRU or b_ih is None or b_hh is None else b_ih + b_hh)
    next_h, next_c = x.new_empty(*wanted), x.new_empty(*wanted) if kind == LSTM else None
    failed = lib.secateur_cell(
        kind,
        None if ih is None else ih.data_ptr(),
        source,
        None if gates is None else gates.data_ptr(),
        hh.data_ptr(),
        n,
        None if b_ih is None else b_ih.data_ptr(),
        None if b_hh is None else b_hh.data_ptr(),
        first_h,
        first_c,
        next_h.data_ptr(),
        None if next_c is None else next_c.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise products.failure(failed)
    if choices & products.CHECKED and not _finite(next_h, next_c):  # gates were beyond float32
        return None
    return next_h, next_c


def dense_cell(kind: int, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor | None]) -> Any:
    """The same by torch, for [batch, features] and given states: the next states, or a pair of states and cells."""
    step: Any = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)[kind]
    return step(x, h if c is None else (h, c), *weights)
