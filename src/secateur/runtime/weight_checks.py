"""Whether the dense weights of a layer are still those that were packed.

Every call looks at each tensor's address and version, at 8 of its non-zeros, spread over it, and at one of its
pieces, the next one in turn. A piece has a 2048th of the weights, 256 at least. So a change of all weights shows at the
next call, one of a single weight within 2,048 calls, however it was made.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.runtime import native

__all__: list[str] = []  # reached through secateur.accelerate and secateur.runtime alone

_ANCHORS, _PIECES, _SMALLEST = 8, 2048, 256  # as in native/weights.cpp
_AT_ONCE = 1 << 22  # bytes, which take eight times as much while they are summed up


class Snapshot:
    """What the weights of a layer were when they were packed; holds none of them.

    Args:
        weights: by name; each in one piece of memory, in whatever order of its dimensions.
        trusted: calls look at addresses and versions alone.

    Attributes:
        watches: what calls look at.
    """

    def __init__(self, weights: Mapping[str, Tensor], trusted: bool = False) -> None:
        self.stamps = tuple((name, w.data_ptr(), version(w), w.stride(), w.shape) for name, w in weights.items())
        there = [weight for weight in weights.values() if not weight.is_meta]  # others were released
        self._all = [watch(weight) for weight in there]
        self.watches = [] if trusted else self._all
        addresses = [weight.data_ptr() for weight in there]
        self._native = pointers(addresses), pointers([one.address for one in self._all])
        self._differ = _looking(self.watches, self._native)

    @property
    def addresses(self) -> list[int]:
        """Where the weights are."""
        return [address for _, address, *_ in self.stamps]

    def holds(self, found: Mapping[str, Tensor | None]) -> bool:
        """Whether the weights look the same, as far as one call looks."""
        return self._in_place(found) and not self._differ()

    def _in_place(self, found: Mapping[str, Tensor | None]) -> bool:
        try:
            for name, address, number, stride, shape in self.stamps:
                weight: Any = found[name]
                if weight._version != number or weight.data_ptr() != address or weight.stride() != stride:
                    return False
                if weight.shape != shape:
                    return False
            return True
        except (KeyError, AttributeError, TypeError):  # gone
            return False
        except RuntimeError:  # made in inference mode: these have no version
            return all(
                (weight := found.get(name)) is not None
                and [weight.data_ptr(), version(weight), weight.stride(), weight.shape] == stamp
                for name, *stamp in self.stamps
            )

    def same(self, found: Mapping[str, Tensor | None]) -> bool:
        """Whether each single weight is the same, wherever it lies now."""
        if not self._all:
            return self._in_place(found)
        weights = []
        for name, *_, stride, shape in self.stamps:
            weight = found.get(name)
            if weight is None or weight.shape != shape or weight.dtype is not torch.float32 or not weight.is_cpu:
                return False
            if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
                return False  # given back
            laid = weight.detach()
            weights.append(laid if laid.stride() == stride else laid.new_empty_strided(shape, stride).copy_(laid))
        addresses = pointers([weight.data_ptr() for weight in weights])
        return not seen_to_differ(self._all, (addresses, self._native[1]), all=True)


class NativeWatch:
    """Checksums of a tensor's pieces, and some of its non-zeros, kept by the native library."""

    def __init__(self, weight: Tensor, lib: Any) -> None:
        given = (weight.data_ptr(), weight.numel())
        self.memory = torch.empty(lib.secateur_watch(*given, None) // 8, dtype=torch.int64)
        self.address = self.memory.data_ptr()
        lib.secateur_watch(*given, self.address)


class TorchWatch:
    """The same where there is no native library."""

    address = 0

    def __init__(self, weight: Tensor) -> None:
        bits = _bits(weight.data_ptr(), weight.numel())
        self.count, self.turn = weight.numel(), 0
        self.piece = max(_SMALLEST, -(-self.count // _PIECES))
        self.sums = [_checksum(part) for part in torch.split(bits, self.piece)]
        nonzeros = (bits << 1).nonzero().flatten()
        self.anchors = nonzeros[:: max(1, -(-len(nonzeros) // _ANCHORS))]
        self.values = bits[self.anchors]

    def differs(self, address: int, all: bool) -> bool:
        bits = _bits(address, self.count)
        if not torch.equal(bits[self.anchors], self.values):
            return True
        turns = range(len(self.sums)) if all else range(self.turn, self.turn + 1)
        self.turn = (self.turn + 1) % max(len(self.sums), 1)
        return any(_checksum(bits[i * self.piece : (i + 1) * self.piece]) != self.sums[i] for i in turns)


Watch = NativeWatch | TorchWatch


def watch(weight: Tensor) -> Watch:
    """Take down what a float32 tensor holds."""
    lib = native.library()
    return TorchWatch(weight) if lib is None else NativeWatch(weight, lib)


def pointers(addresses: list[int]) -> Any:
    """A C array of addresses."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


def seen_to_differ(watches: list[Watch], at: tuple[Any, Any], all: bool = False) -> bool:
    """Whether tensors differ from what was taken down, as far as one call looks, or in any weight.

    Args:
        watches: one for each tensor.
        at: C arrays of the addresses of the tensors and of the watches.
        all: compare every weight.
    """
    if not watches:
        return False
    if isinstance(watches[0], NativeWatch):
        lib = native.library()
        return lib is not None and bool(lib.secateur_changed(len(watches), *at, all))
    return any(one.differs(address, all) for one, address in zip(watches, at[0], strict=True))  # type: ignore[union-attr]


def _looking(watches: list[Watch], at: tuple[Any, Any]) -> Callable[[], Any]:
    """`seen_to_differ` of these, for calls that count microseconds."""
    lib = native.library()
    if lib is None or not watches or not isinstance(watches[0], NativeWatch):
        return functools.partial(seen_to_differ, watches, at)
    return functools.partial(lib.secateur_changed, len(watches), *map(ctypes.addressof, at), 0)


def version(tensor: Tensor | None) -> int | None:
    """How often torch saw a tensor written to; None where it does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def checksum(tensor: Tensor) -> int:
    """A number of all bits of a tensor on any device, and of where in it they are."""
    total = 0
    for part in torch.split(tensor.detach().flatten().view(torch.uint8), _AT_ONCE):
        total = (31 * total + _checksum(part)) % (1 << 64)
    return total


def _bits(address: int, count: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer((ctypes.c_int32 * count).from_address(address), dtype=torch.int32)


def _checksum(bits: Tensor) -> int:
    return int((bits * torch.arange(1, 2 * len(bits), 2, dtype=torch.int64, device=bits.device)).sum())
