"""The sparse products on tensors: the native kernels where they are there, torch's CSR or dense elsewhere.

A matrix is packed once into a `uint8` blob. Each product also gets the dense weight and `choices`, whose bit `b`
says whether inputs of row class `b` (`bucket`) take the sparse kernel; all others take torch's dense one, as do
inputs that have no memory of their own (under vmap). With the bit `CHECKED` so do inputs that are not finite.
A dense weight on the meta device was released: it is rebuilt from the packed one where dense has to do it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import InputError, StateError, warn
from secateur.measurement.costs import counting
from secateur.runtime import native
from secateur.runtime.layouts import channels_first, readable

__all__: list[str] = []  # reached through secateur.accelerate alone

ALL = (1 << 61) - 1
"""Sparse for every number of rows."""

CHECKED = 1 << 61
"""A further bit of `choices`: inputs with a NaN or an infinity run dense, as a sparse kernel skips 0 times NaN."""

_CSR = b"csr-0001"  # how a blob begins that torch can read
_twelve = ctypes.c_int64 * 12
_warned: set[str] = set()


def bucket(rows: int) -> int:
    """Row class of an input: b holds the rows above 2**(b - 1) up to 2**b.

    >>> [bucket(rows) for rows in (1, 2, 3, 4, 5, 128)]
    [0, 1, 2, 2, 3, 7]
    """
    return (rows - 1).bit_length() if rows > 1 else 0


def form() -> str:
    """What packed weights look like here: "native", or "csr" without the native library."""
    return "csr" if native.library() is None else "native"


def pack(weight: Tensor, groups: int = 1, values: torch.dtype = torch.float32) -> Tensor:
    """Pack a matrix: float32 [rows, columns], of a grouped convolution [rows, columns / groups]; gives uint8 [bytes].

    Raises:
        InputError: the native library cannot hold so many rows or columns, or `values` a weight.
    """
    weight = weight.detach()
    if values is not torch.float32 and not weight.to(values).isfinite().all():
        kind = str(values).removeprefix("torch.")
        raise InputError(f"a weight of {weight.abs().max():.3g} does not fit into {kind}")
    if native.library() is not None:
        return native.pack(weight, groups, values)
    weight = weight.to(values).float()
    _csr_is_beta()
    csr = weight.to_sparse_csr()
    parts = (csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    return torch.cat([torch.frombuffer(bytearray(_CSR), dtype=torch.uint8), *(p.view(torch.uint8) for p in parts)])


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix of float32 [rows, columns] that was packed, with +0 for what was zero.

    Raises:
        StateError: the native library that packed it is not there, or is another one.
    """
    if (csr := _csr(packed, rows, columns)) is not None:
        return csr.to_dense()
    if native.library() is None:
        raise StateError(
            "the dense weights were released, and to read the packed ones takes the native library, which is not "
            "here: install secateur with it (SECATEUR_NATIVE=1), or accelerate the model here"
        )
    if (found := native.unpack(packed, rows, columns)) is None:
        raise failure(-1)
    return found


def dense(weight: Tensor, packed: Tensor) -> Tensor:
    """A dense weight [rows, columns] to compute with: it itself or, where it was released, rebuilt in its dtype."""
    if not weight.is_meta or packed.is_meta:  # moved there with the layer
        return weight
    if not counting():
        warn_once(
            "a layer whose dense weights were released has to run dense for a call, so they are rebuilt, which takes "
            "much longer than the call. Accelerate with keep_dense=True if that is often so"
        )
    tracer: Any = torch._C
    tracing = tracer._get_tracing_state()
    try:
        tracer._set_tracing_state(None)  # to a trace the weight is a constant
        return unpack(packed, *weight.shape).to(weight.dtype)
    finally:
        tracer._set_tracing_state(tracing)


def warn_once(message: str) -> None:
    """Issue a warning of which one in a process is enough."""
    if message not in _warned:
        _warned.add(message)
        warn(message)


def linear(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, choices: int, code: native.Code | None = None
) -> Tensor:
    """`F.linear(x, weight, bias)`; x: float32 [..., columns] of any number of dimensions but none.

    With the code of the packed matrix, inputs of its row classes take that.
    """
    rows, columns = weight.shape
    if not readable(bias, rows) or (found := matrix(x, columns, choices)) is None:
        empty = weight.is_meta and not x.numel()  # then the product reads no weight
        return F.linear(x, x.new_zeros(1).expand(rows, columns) if empty else dense(weight, packed), bias)
    x, n, source = found
    if (lib := native.library()) is None:
        return _csr_linear(x, weight, packed, bias)
    out = _result(x, n, rows)
    offset = None if bias is None else bias.data_ptr()
    made = code.handle if code is not None and code.choices >> (n - 1).bit_length() & 1 else None
    failed = lib.secateur_linear(packed.data_ptr(), made, source, n, offset, out.data_ptr(), torch.get_num_threads())
    if failed:
        raise failure(failed)
    return out


def chain(
    x: Tensor,
    widths: tuple[int, int],
    layers: int,
    blobs: Any,
    codes: tuple[Any, int],
    biases: Any,
    activations: Any,
    choices: int,
) -> Tensor | None:
    """Products one after the other, with activations after some; None where `linear` must do them singly.

    Args:
        x: float32 [..., columns of the first].
        widths: columns of the first matrix, rows of the last.
        layers: how many there are.
        blobs: a C array of the addresses of packed matrices; biases: of theirs, or NULL; activations: of the
            numbers in `activations`.
        codes: a C array of handles of their code, or NULL, and the row classes that take it.
        choices: as for `linear`.
    """
    columns, rows = widths
    if (found := _of_several(x, columns, choices)) is None:
        return None
    lib, x, n, source = found
    out = _result(x, n, rows)
    made = codes[0] if codes[1] >> (n - 1).bit_length() & 1 else None
    threads = torch.get_num_threads()
    failed = lib.secateur_chain(layers, blobs, made, biases, activations, source, n, out.data_ptr(), threads)
    if failed:
        raise failure(failed)
    return out


def several(
    x: Tensor, widths: tuple[int, Sequence[int]], blobs: Any, code: Callable[[int], Any], biases: Any, choices: int
) -> list[Tensor] | None:
    """Products of one input, each as `linear` gives it; None where `linear` must do them singly.

    Args:
        x: float32 [..., columns].
        widths: columns of all matrices, and rows of each.
        blobs: a C array of the addresses of packed matrices; biases: of theirs, or NULL.
        code: gives, for a row class, a C array of handles of their code, or NULL.
        choices: as for `linear`.
    """
    columns, rows = widths
    if (found := _of_several(x, columns, choices)) is None:
        return None
    lib, x, n, source = found
    outs = [_result(x, n, one) for one in rows]
    at = (ctypes.c_void_p * len(outs))(*map(Tensor.data_ptr, outs))
    made, threads = code((n - 1).bit_length()), torch.get_num_threads()
    if failed := lib.secateur_products(len(outs), blobs, made, biases, source, n, at, threads):
        raise failure(failed)
    return outs


def matrix(x: Tensor, columns: int, choices: int) -> tuple[Tensor, int, int] | None:
    """An input in one piece, its rows and its address; None if no sparse product can or is to take it."""
    try:
        n = x.numel() // columns
        if n == 0 or x.shape[-1] != columns or not choices >> (n - 1).bit_length() & 1:
            return None
        if choices & CHECKED and not finite(x):
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        return x, n, x.data_ptr()
    except (RuntimeError, IndexError):  # under vmap, nested, not strided, or of no dimension
        return None


def _of_several(x: Tensor, columns: int, choices: int) -> tuple[Any, Tensor, int, int] | None:
    """The library and what `matrix` gives, for layers of one call; None where each has to look at its own input."""
    if choices & CHECKED or (lib := native.library()) is None or (found := matrix(x, columns, choices)) is None:
        return None
    return lib, *found


def finite(*tensors: Tensor) -> bool:
    """Whether no value is NaN or infinite; False, too, if the sum of all is beyond float32."""
    return all(math.isfinite(float(tensor.sum())) for tensor in tensors)


def _result(x: Tensor, n: int, rows: int) -> Tensor:
    shape = x.shape  # not given as a tuple, which would take half a microsecond more
    if len(shape) == 3:
        return x.new_empty(shape[0], shape[1], rows)
    return x.new_empty(n, rows) if len(shape) == 2 else x.new_empty(*shape[:-1], rows)


def conv2d(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    choices: int,
    code: native.Code | None = None,
) -> Tensor:
    """`F.conv2d(x, weight, bias, ...)`; x: float32 [batch, channels, height, width]; sparse it comes contiguous.

    With the code of the packed matrix, inputs of its row classes and of its shape take that.
    """
    found = convolved(x, tuple(weight.shape), packed, bias, (stride, padding, dilation), groups, choices, code)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups) if found is None else found


def convolved(
    x: Tensor,
    shape: tuple[int, ...],
    packed: Tensor,
    bias: Tensor | None,
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
    choices: int,
    code: native.Code | None = None,
) -> Tensor | None:
    """A sparse `F.conv2d` of a weight of this shape; None where dense has to do it.

    Args:
        steps: stride, padding and dilation.
    """
    lib, sizes = native.library(), x.shape
    geometry, (out_h, out_w) = conv_shape(tuple(sizes), shape, *steps)
    pixels = sizes[0] * out_h * out_w
    fits = pixels > 0 and out_h > 0 and sizes[1] == shape[1] * groups and readable(bias, shape[0])
    if lib is None or not fits or not choices >> bucket(pixels) & 1:
        return None
    try:
        x = channels_first(x)
        source = x.data_ptr()
        if choices & CHECKED and not finite(x):
            return None
    except RuntimeError:  # under vmap
        return None
    out = x.new_empty(sizes[0], shape[0], out_h, out_w)
    offset = None if bias is None else bias.data_ptr()
    threads = torch.get_num_threads()
    made = code.handle if code is not None and code.choices >> bucket(pixels) & 1 else None
    failed = lib.secateur_conv2d(packed.data_ptr(), made, source, geometry, offset, out.data_ptr(), threads)
    if failed:
        raise failure(failed)
    return out


def network(x: Tensor, steps: Any, size: Sequence[int]) -> Tensor | None:
    """Steps of a network of convolutions one after the other; None where they have to be done singly.

    Args:
        x: float32 [batch, channels, height, width].
        steps: a C array of `native.Step`, for images of this size.
        size: channels, height and width of the result.
    """
    lib, batch = native.library(), x.shape[0]
    if lib is None or batch == 0:
        return None
    try:
        x = channels_first(x)
        source = x.data_ptr()
    except RuntimeError:  # under vmap
        return None
    if not source:
        return None
    out = x.new_empty(batch, *size)
    at, threads = ctypes.addressof(steps), torch.get_num_threads()
    if failed := lib.secateur_network(at, len(steps), batch, source, out.data_ptr(), threads):
        raise failure(failed)
    return out


@functools.lru_cache(1024)
def conv_shape(
    image: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, list[int]]:
    """What the native library wants to know of a convolution, and the height and width it gives."""
    found = _twelve(*image, *weight[-2:], *stride, *padding, *dilation)
    return found, conv_size(image[-2:], weight[-2:], stride, padding, dilation)


def conv_size(
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width that a convolution gives.

    >>> conv_size((56, 56), (3, 3), (2, 2), (1, 1), (1, 1))
    [28, 28]
    """
    axes = zip(image, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * pad - spread * (width - 1) - 1) // step + 1 for size, width, step, pad, spread in axes]


@functools.cache
def _csr_is_beta() -> None:
    """Trigger once, and suppress, torch's warning that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _csr_linear(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if (csr := _csr(packed, *weight.shape)) is None:
        return F.linear(x, dense(weight, packed), bias)
    flat = x.reshape(-1, x.shape[-1])
    out = (csr @ flat.t()).t() if bias is None else torch.addmm(bias[:, None], csr, flat.t()).t()
    return out.contiguous().view(*x.shape[:-1], weight.shape[0])


def _csr(packed: Tensor, rows: int, columns: int) -> Tensor | None:
    """What torch can read; None of what was packed where there was a native library."""
    if ctypes.string_at(packed.data_ptr(), len(_CSR)) != _CSR:
        return None
    words = packed[len(_CSR) :].view(torch.int32)
    count = (len(words) - rows - 1) // 2
    crow, col, values = torch.split(words, [rows + 1, count, count])
    _csr_is_beta()
    return torch.sparse_csr_tensor(crow, col, values.view(torch.float32), (rows, columns), check_invariants=False)


def failure(code: int) -> Exception:
    """What a native function's negative answer means."""
    if code == -2:
        return MemoryError("no memory for the scratch of a sparse kernel: use a smaller batch")
    return StateError(
        "the packed weights are of another version of secateur's native library. "
        "Make them again: fast = sc.accelerate(sc.dense(fast), example_inputs)"
    )
