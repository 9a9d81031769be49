"""Follows generated code without a processor that has AVX-512, and lets it touch nothing but what it was given."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

RCX, RDX, RSI, RDI, R8 = 1, 2, 6, 7, 8
NEAR = struct.Struct("<i")


class Region(NamedTuple):
    """Memory that code may touch: floats from an address on."""

    address: int
    floats: np.ndarray
    writable: bool = False


@dataclass
class Processor:
    """The registers and the memory that generated code sees; whatever else it does is an error."""

    regions: list[Region]
    general: list[int] = field(default_factory=lambda: [0] * 16)
    vectors: np.ndarray = field(default_factory=lambda: np.full((32, 16), np.nan, np.float32))
    done: Counter[str] = field(default_factory=Counter)
    zero: bool = False

    def at(self, address: int, count: int, write: bool = False) -> np.ndarray:
        """So many floats at an address, all of them in one region."""
        for start, floats, writable in self.regions:
            offset = address - start
            if offset >= 0 and offset + 4 * count <= floats.nbytes and (writable or not write):
                assert offset % 4 == 0
                return floats[offset // 4 : offset // 4 + count]
        raise AssertionError(f"{'writes' if write else 'reads'} {count} floats at {address:#x}")

    def call(self, code: bytes, entry: int) -> None:
        """Run from an entry, which must be a landing pad, to its return."""
        assert code.startswith(b"\xf3\x0f\x1e\xfa", entry)
        at = entry + 4
        while code[at] != 0xC3:
            at = self.step(code, at)

    def step(self, code: bytes, at: int) -> int:
        """One instruction; returns where the next is."""
        if code[at] == 0x62:
            return self.vector(code, at)
        if code[at : at + 3] == b"\x0f\x18\x15":  # of code ahead: never a fault
            self.done["fetch code"] += 1
            return at + 7
        if code[at : at + 3] == b"\xc5\xf8\x77":
            self.vectors[:16] = np.nan  # of which the lowest lanes would stay
            return at + 3
        rex = code[at] if 0x40 <= code[at] < 0x50 else 0
        if code[at + 1 : at + 3] == b"\x0f\x18" and rex == 0x41 and code[at + 3] & 0xF8 == 0x90:
            self.done["fetch weights"] += 1
            return at + 8
        if code[at : at + 2] == b"\x0f\x85":
            return at + 6 + (0 if self.zero else NEAR.unpack_from(code, at + 2)[0])
        assert rex & 0xF8 == 0x48, f"{code[at]:#x} at {at}"
        base = code[at + 2] & 7 | (rex & 1) << 3
        match code[at + 1], code[at + 2] >> 3:
            case 0x8D, _:
                address, after = self.address(code, at + 2, rex & 1, 1)
                self.general[code[at + 2] >> 3 & 7 | (rex & 4) << 1] = address
                return after
            case 0x81, 0o30:
                self.general[base] += NEAR.unpack_from(code, at + 3)[0]
                return at + 7
            case 0xFF, 0o31:
                self.general[base] -= 1
                self.zero = self.general[base] == 0
                return at + 3
        raise AssertionError(f"{code[at + 1]:#x} at {at}")

    def address(self, code: bytes, at: int, high: int, scale: int) -> tuple[int, int]:
        """What the ModRM byte at `at` points to, and where the instruction goes on."""
        mode, base = code[at] >> 6, code[at] & 7
        assert mode in (1, 2)
        assert base not in (4, 5)
        start = self.general[base | high << 3]
        if mode == 1:
            return start + scale * struct.unpack_from("b", code, at + 1)[0], at + 2
        return start + NEAR.unpack_from(code, at + 1)[0], at + 5

    def vector(self, code: bytes, at: int) -> int:
        """An instruction of AVX-512, without masks."""
        first, second, third, op = code[at + 1 : at + 5]
        assert third & 0xE7 == 0x40, "512 bits, no mask"
        assert second & 0x84 == 0x04, "words of 32 bits"
        spread, kind = bool(third & 0x10), (first & 7, second & 3, op)
        register = (code[at + 5] >> 3 & 7) | (0 if first & 0x80 else 8) | (0 if first & 0x10 else 16)
        other = (~second >> 3 & 15) | (0 if third & 8 else 16)
        self.done[f"{op:x}"] += 1
        if code[at + 5] >> 6 == 3:
            assert not spread, "registers alone"
            last = (code[at + 5] & 7) | (0 if first & 0x20 else 8) | (0 if first & 0x40 else 16)
            return self.registers(code, at, kind, register, other, last)
        assert first & 0x40, "no index"
        one = spread or kind == (2, 1, 0x18)
        address, after = self.address(code, at + 5, 0 if first & 0x20 else 1, 4 if one else 64)
        match kind, spread:
            case (1, 0, 0x10), False:
                self.vectors[register] = self.at(address, 16)
            case (1, 0, 0x11), False:
                self.at(address, 16, write=True)[:] = self.vectors[register]
            case (2, 1, 0x18), False:
                self.vectors[register] = self.at(address, 1)
            case (2, 1, 0xB8), True:
                product = self.vectors[other].astype(np.float64) * self.at(address, 1)
                self.vectors[register] = (product + self.vectors[register]).astype(np.float32)
            case _:
                raise AssertionError(f"{kind} at {at}")
        return after

    def registers(self, code: bytes, at: int, kind: tuple[int, int, int], to: int, first: int, second: int) -> int:
        """One that touches registers alone."""
        a, b = self.vectors[first], self.vectors[second]
        match kind:
            case (1, 0, 0x58):
                self.vectors[to] = a + b
            case (1, 1, 0xEF):
                self.vectors[to] = (a.view(np.int32) ^ b.view(np.int32)).view(np.float32)
            case (3, 1, 0x03):  # of a behind b, the lanes from the immediate on
                self.vectors[to] = np.concatenate([b, a])[code[at + 6] :][:16]
                return at + 7
            case _:
                raise AssertionError(f"{kind} at {at}")
        return at + 6
