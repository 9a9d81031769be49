"""The binding to the native kernels (`native/secateur.h`), by ctypes; nothing else in the package calls them.

The library is looked for in this package's folder. Where it is missing (`SECATEUR_NATIVE=0 pip install .`, or no
compiler) `library()` is None and everything above works on torch alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputError

ABI = 18
VALUES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What packed values may be, as the library numbers them."""
Shape = tuple[int, ...]
_LARGE_PAGE = 2 << 20  # bytes, on the CPUs for which there are kernels
_FUNCTION = re.compile(r"^SECATEUR_API (.+?)(secateur_\w+)\((.*?)\);", re.MULTILINE | re.DOTALL)
_NUMBERS: dict[str, type | None] = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "void": None}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they were not built, or are of another version."""
    if (path := _path()) is None:
        return None
    lib = ctypes.CDLL(str(path))
    if lib.secateur_abi() != ABI:
        return None
    lib.secateur_header.restype = ctypes.c_char_p
    for name, (result, arguments) in signatures(lib.secateur_header().decode()).items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if (parallel := _openmp()) is not None:
        lib.secateur_set_parallel(parallel)
    return lib


def signatures(header: str) -> dict[str, tuple[type | None, list[type | None]]]:
    """What each function of a header in the manner of `native/secateur.h` returns and takes, in terms of ctypes.

    >>> found = signatures("SECATEUR_API int32_t secateur_count(const float* x, int64_t n);")
    >>> found == {"secateur_count": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int64])}
    True
    """
    found = _FUNCTION.findall(header)
    return {
        name: (_ctype(result), [_ctype(one) for one in arguments.split(",") if one != "void"])
        for result, name, arguments in found
    }


def _ctype(declared: str) -> type | None:
    if "char*" in declared:
        return ctypes.c_char_p
    return ctypes.c_void_p if "*" in declared or "[" in declared else _NUMBERS[declared.split()[0]]


class Step(ctypes.Structure):
    """A `secateur_step` of the header: what an array of them holds, whose address `secateur_network` takes."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "source", "to", "add", "activation", "counted", "times")),
        *((name, ctypes.c_void_p) for name in ("blob", "code", "scale", "shift")),
        ("shape", ctypes.c_int64 * 12),
    )


def isa() -> str | None:
    """The instruction set the kernels use: "avx512", "avx2", "neon" or "portable"; None without kernels."""
    lib = library()
    return None if lib is None else str(lib.secateur_isa().decode())


def pack(weight: Tensor, groups: int = 1, values: torch.dtype = torch.float32) -> Tensor:
    """Pack a matrix for the kernels.

    Args:
        weight: float32 [rows, columns] on the CPU.
        groups: with more than one, row r sees only the (r // (rows // groups))-th block of columns.
        values: what the values are rounded to, one of `VALUES`.

    Returns:
        uint8 [bytes]: position-independent, may be copied and stored.

    Raises:
        InputError: more than 65,535 * 32 rows or columns.
    """
    lib = library()
    assert lib is not None
    dense = weight.detach().contiguous()
    rows, columns = dense.shape
    size, blob = 3 * dense.nbytes + 4096, torch.empty(0, dtype=torch.uint8)  # enough, or packing tells how much is
    while blob.numel() < size:
        blob = torch.empty(size, dtype=torch.uint8)
        given = (dense.data_ptr(), rows, columns * groups, groups, VALUES[values], blob.data_ptr(), blob.numel())
        size = lib.secateur_pack(*given)
        if size < 0:
            raise InputError(f"a matrix of {rows} x {columns * groups} cannot be packed. Leave this layer dense.")
    return _in_large_pages(blob[:size])


def _in_large_pages(blob: Tensor) -> Tensor:
    """A copy of a blob, in large pages as far as it fills such: fewer are looked up when it comes from memory."""
    size = blob.numel()
    whole = size // _LARGE_PAGE * _LARGE_PAGE
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return blob.clone()
    memory = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
    with contextlib.suppress(OSError):  # of a system without them
        memory.madvise(mmap.MADV_HUGEPAGE, first, whole)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=first).copy_(blob)


def unpack(blob: Tensor, rows: int, columns: int, groups: int = 1) -> Tensor | None:
    """The matrix [rows, columns] of float32 that a blob was packed from; None if it was not packed from such a one."""
    lib = library()
    weight = blob.new_empty((rows, columns), dtype=torch.float32)  # so whoever watches sees what it is made from
    given = (blob.data_ptr(), blob.numel(), rows, columns * groups, groups, weight.data_ptr())
    return None if lib is None or lib.secateur_unpack(*given) else weight


class Dictionaries:
    """What dictionaries hold, to see whether it is still the very same: by address, which is why it is kept.

    Args:
        own: what a dictionary holds that `same` will be given.
        others: further ones, and what these hold.
        anything: stands in `own` for what is not compared.
    """

    def __init__(self, own: dict[str, Any], others: list[tuple[dict[Any, Any], dict[Any, Any]]], anything: Any) -> None:
        self._kept = own, others
        entries: list[int | None] = []
        for held in (own, *(held for _, held in others)):
            for key, value in held.items():
                entries += [id(key), None if value is anything else id(value)]
            entries.append(None)
        there = [id(one) for one, _ in others]
        self._arrays = _addresses(there), _addresses(entries)
        self._others = len(others), *map(ctypes.addressof, self._arrays)
        self._compare = _comparison(library())

    def same(self, own: dict[str, Any]) -> bool:
        """Whether all hold the same objects under the same keys in the same order; False without the library."""
        return self._compare is not None and bool(self._compare(id(own), *self._others))


@functools.cache
def _comparison(lib: ctypes.CDLL | None) -> Any:
    """The library's comparison of dictionaries, called so that no other thread changes these meanwhile."""
    if lib is None:
        return None
    given: Any = lib.secateur_same
    function = ctypes.PYFUNCTYPE(given.restype, *given.argtypes)(("secateur_same", lib))
    return functools.partial(function, ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p))


def _addresses(found: Sequence[int | None]) -> Any:
    return (ctypes.c_void_p * len(found))(*found)


class Code:
    """Machine code made for one packed matrix; a copy of it, or what is pickled, is made anew.

    Args:
        blob: the packed matrix, which is kept.
        shape: of the convolution that it is for, or None.
        adds: whether it adds to what is there.
        handle: of the code, in the native library.

    Attributes:
        choices: bit b tells whether inputs of row class b are to take it.
        bytes: of code and of the weights that it reads.
    """

    def __init__(self, blob: Tensor, shape: Shape | None, adds: bool, handle: int) -> None:
        lib = library()
        assert lib is not None
        self.blob, self.shape, self.adds, self.handle, self.choices = blob, shape, adds, handle, 0
        self.bytes = sum(int(lib.secateur_generated(handle, part, None)) for part in (0, 1))
        weakref.finalize(self, lib.secateur_discard, handle)

    def __reduce__(self) -> Any:
        return _again, (self.blob, self.shape, self.adds, self.choices)


def generates() -> bool:
    """Whether code that is generated can run: AVX-512, and memory that the system lets be executed."""
    lib = library()
    return lib is not None and bool(lib.secateur_generates())


def generate(blob: Tensor, shape: Shape | None = None, adds: bool = False, run: int = 1) -> Code | None:
    """Make the code of a packed matrix.

    Args:
        blob: as `pack` gives it.
        shape: twelve numbers as `secateur_conv2d` takes them, for a convolution of whatever batch.
        adds: as `secateur_recurrent` wants it of a recurrent matrix.
        run: 0 makes it to be looked at; 2, for tests, has what it computes computed without it, on any CPU.

    Returns:
        The code; None if it is no packed matrix, or code that is generated cannot run here.
    """
    lib = library()
    sizes = None if shape is None else (ctypes.c_int64 * 12)(*shape)
    handle = None if lib is None else lib.secateur_generate(blob.data_ptr(), blob.numel(), sizes, adds, run)
    return None if handle is None else Code(blob, shape, adds, handle)


def _again(blob: Tensor, shape: Shape | None, adds: bool, choices: int) -> Code | None:
    if (code := generate(blob, shape, adds)) is not None:
        code.choices = choices
    return code


def _path() -> Path | None:
    names = {"win32": "secateur_native.dll", "darwin": "libsecateur_native.dylib"}
    name = names.get(sys.platform, "libsecateur_native.so")
    if (given := os.environ.get("SECATEUR_LIBRARY")) is not None:
        return Path(given) if given else None
    assert __package__ is not None
    places = (Path(folder) / name for folder in sys.modules[__package__].__path__)
    return next((path for path in places if path.exists()), None)


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch itself runs on: one pool of threads for both."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        pass
    if sys.platform == "linux":
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.rpartition(" ")[2]
            if "omp" in path.rpartition("/")[2] and ".so" in path:
                try:
                    return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
                except (AttributeError, OSError):
                    continue
    return None
