"""The C functions of secateur alone, without the modules around them: what `runtime.py --kernel` adds to its tables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from runtime_cases import Case, Fan
from secateur.runtime import native
from secateur.runtime.recurrent_products import KINDS

Step = Callable[[Tensor], Tensor]  # writes into a buffer of its own, and returns it


def call(case: Case, model: nn.Module) -> Callable[[], object]:
    """Packs the model's layers; the call runs them all, in order, on one thread.

    Raises:
        NotImplementedError: the model has others than Linear, ReLU, Conv2d, or is no plain LSTM, GRU or RNN.
    """
    x = case.example()
    if isinstance(model, nn.RNNBase):
        return recurrent(model, x)
    chained = not isinstance(model, Fan)
    layers = list(model) if isinstance(model, nn.Sequential) else list(getattr(model, "layers", []))
    if not layers:
        raise NotImplementedError("a model of other layers")
    steps, into = [], x
    for layer in layers:
        steps.append(step(layer, into))
        into = steps[-1](into) if chained else x

    def run() -> list[Tensor]:
        into, outs = x, []
        for one in steps:
            outs.append(one(into))
            if chained:
                into = outs[-1]
        return outs[-1:] if chained else outs

    return run


def step(layer: nn.Module, x: Tensor) -> Step:
    if isinstance(layer, nn.ReLU):
        return torch.relu_
    if isinstance(layer, nn.Linear):
        return linear(layer.weight, layer.bias, len(x))
    if isinstance(layer, nn.Conv2d):
        return convolution(layer, x)
    raise NotImplementedError(f"no C function for {type(layer).__name__}")


def linear(weight: Tensor, bias: Tensor, n: int) -> Step:
    lib, blob, y = library(), native.pack(weight), torch.empty(n, len(weight))

    def run(x: Tensor) -> Tensor:
        lib.secateur_linear(blob.data_ptr(), None, x.data_ptr(), n, bias.data_ptr(), y.data_ptr(), 1)
        return y

    return run


def convolution(layer: nn.Conv2d, x: Tensor) -> Step:
    lib, blob = library(), native.pack(layer.weight.flatten(1), layer.groups)
    y = layer(x).contiguous()
    numbers = [*x.shape, *layer.kernel_size, *layer.stride, *layer.padding, *layer.dilation]
    shape = (ctypes.c_int64 * 12)(*(int(number) for number in numbers))

    def run(x: Tensor) -> Tensor:
        lib.secateur_conv2d(blob.data_ptr(), None, x.data_ptr(), shape, layer.bias.data_ptr(), y.data_ptr(), 1)
        return y

    return run


def recurrent(model: nn.RNNBase, x: Tensor) -> Callable[[], object]:
    """One direction, time-major, from zero states, as the cases have it."""
    lib, (steps, batch, _) = library(), x.shape
    sizes, hidden, kind = torch.full((steps,), batch), model.hidden_size, KINDS.index(model.mode)
    lstm, gru = isinstance(model, nn.LSTM), isinstance(model, nn.GRU)
    layers = []
    for k in range(model.num_layers):
        w_ih, w_hh, b_ih, b_hh = (getattr(model, f"{name}_l{k}") for name in ("weight_ih", "weight_hh", "bias_ih",
                                                                              "bias_hh"))  # fmt: skip
        project = linear(w_ih, b_ih if gru else b_ih + b_hh, steps * batch)
        state = torch.zeros(2, batch, hidden)
        layers.append((project, native.pack(w_hh), b_hh, state, torch.empty(steps, batch, hidden)))

    states = [state[which] for which in range(2 if lstm else 1) for *_, state, _ in layers]

    def run() -> list[Tensor]:
        into = x
        for project, blob, bias, state, out in layers:
            gates = project(into)
            state.zero_()
            lib.secateur_recurrent(
                kind, blob.data_ptr(), None, gates.data_ptr(), sizes.data_ptr(), steps, batch,
                bias.data_ptr() if gru else None, state[0].data_ptr(), state[1].data_ptr() if lstm else None,
                out.data_ptr(), hidden, 0, 1)  # fmt: skip
            into = out
        return [into, *states]

    return run


def library() -> ctypes.CDLL:
    if (lib := native.library()) is None:
        raise NotImplementedError("the native library was not built")
    return lib
