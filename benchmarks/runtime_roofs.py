"""The roofs of one core: how many multiply-adds a second, and how many bytes of memory, it can do at all.

    python benchmarks/runtime_roofs.py

A few lines of C, compiled for this machine by `cc`: products and sums in registers, and a sum over 256 MB.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES = 256 * 2**20
STEPS = 200_000  # of twelve vectors each, enough to hide that a sum takes four cycles; less than a slice of time in all
TRIES = 200, 9  # of multiply-adds and of memory

SOURCE = """
#ifdef __AVX512F__
enum { kFloats = 16 };
#else
enum { kFloats = 8 };
#endif
typedef float V __attribute__((vector_size(4 * kFloats)));

long multiply_add(long steps, float* out) {
    V sum[12], a, b;
    for (int i = 0; i < kFloats; i++) a[i] = out[i], b[i] = out[i] / 2;
    for (int k = 0; k < 12; k++) sum[k] = a + (float)k;
    for (long s = 0; s < steps; s++) {
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++) sum[k] = sum[k] * a + b;
        __asm__ volatile("" : "+x"(a), "+x"(b));  /* so that each step is done */
    }
    for (int k = 0; k < 12; k++) a += sum[k];
    for (int i = 0; i < kFloats; i++) out[i] = a[i];
    return steps * 12 * kFloats;
}

void read_all(const V* from, long vectors, float* out) {
    V sum[8] = {0};
    for (long i = 0; i + 8 <= vectors; i += 8)
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) sum[k] += from[i + k];
    for (int k = 1; k < 8; k++) sum[0] += sum[k];
    for (int i = 0; i < kFloats; i++) out[i] = sum[0][i];
}

int floats(void) { return kFloats; }
"""


@dataclass(frozen=True)
class Roofs:
    """What one core does in a second: multiply-adds of float32, and bytes read from memory."""

    multiply_adds: float
    bytes: float

    def share(self, multiply_adds: float, bytes: float, seconds: float) -> float:
        """How near a call is to the nearer of the two roofs: 1 is on it."""
        return max(multiply_adds / self.multiply_adds, bytes / self.bytes) / seconds

    def __str__(self) -> str:
        return (f"Roofs of one core: {self.multiply_adds / 1e9:.3g} billion multiply-adds of float32 and "
                f"{self.bytes / 1e9:.3g} GB of memory a second")  # fmt: skip


@functools.cache
def roofs() -> Roofs | None:
    """Measure them, the best of many short tries; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "roofs.c"), Path(folder, "roofs.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True)
        if done.returncode:
            return None
        lib = ctypes.CDLL(str(library))
    lib.multiply_add.restype = ctypes.c_long
    lib.multiply_add.argtypes = [ctypes.c_long, ctypes.c_void_p]
    lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
    memory, out = torch.ones(BYTES // 4), torch.full((16,), 0.5)
    width, most = 4 * lib.floats(), [0.0, 0.0]
    for _ in range(TRIES[0]):
        start = time.perf_counter()
        count = lib.multiply_add(STEPS, out.data_ptr())
        most[0] = max(most[0], count / (time.perf_counter() - start))
        out.fill_(0.5)
    for _ in range(TRIES[1]):
        start = time.perf_counter()
        lib.read_all(memory.data_ptr(), BYTES // width, out.data_ptr())
        most[1] = max(most[1], BYTES / (time.perf_counter() - start))
    return Roofs(*most)


if __name__ == "__main__":
    print(roofs() or "No C compiler, so the roofs cannot be measured.")
