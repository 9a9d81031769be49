"""Prune a checkpoint that may be larger than memory, without the code of its model: in streaming passes, exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur import allocation as allocations
from secateur import selection
from secateur.errors import InputError, InputTypeError, UnknownNameError, nearest
from secateur.patterns import n_m
from secateur.plan import warn_of_collapse
from secateur.scope import PRUNABLE, matches
from secateur.scores import magnitude
from secateur.selection import Applied, Cut, Stream
from secateur.sparsity import fraction, half_up
from secateur.storage.checkpoints import Checkpoint, Shard, opened
from secateur.storage.coding import effort_of, level_of
from secateur.storage.contents import Contents, TensorInfo, info
from secateur.storage.conversion import mine, packed_file_name, plain_file_name, rewrite, write_plain
from secateur.storage.dtypes import name_of, words_of
from secateur.storage.stored import Alias, Stored, parts, regrouped
from secateur.storage.writing import Progress, write_packed
from secateur.support import bits
from secateur.support.files import StrPath
from secateur.support.process_groups import ALONE, Processes
from secateur.support.tables import percent

_STREAMED = "global", "uniform", "erk"


@dataclass(frozen=True)
class Recipe:
    """What to prune, and how much of it, by magnitude.

    Attributes:
        sparsity: fraction of the chosen weights that become zero, 0 <= s < 1, met to one weight.
        allocation: "global" (all ranked together), "uniform" or "erk".
        pattern: None, or `n_m(2, 4)`: at most n of every m weights along the second dimension stay.
        only, skip: globs on the names of tensors; by default each floating-point tensor of two or more dimensions
            is pruned. A name in full takes whatever it names, a bias too.
    """

    sparsity: float
    allocation: str = "global"
    pattern: n_m | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("only", "skip"):  # one glob may stand alone, as for `secateur.weights`
            globs = getattr(self, name)
            object.__setattr__(self, name, (globs,) if isinstance(globs, str) else tuple(globs))


def pattern_of(text: str) -> n_m | None:
    """Read "2:4" as `n_m(2, 4)`, and "" as no pattern.

    Raises:
        InputError: anything else.
    """
    if not text:
        return None
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise InputError(f"no pattern {text!r} for files: give N:M, such as 2:4")
    return n_m(int(n), int(m))


def prune_checkpoint(
    src: StrPath,
    dst: StrPath | None,
    recipe: Recipe,
    *,
    level: str | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Contents:
    """Prune a checkpoint by magnitude; the result is that of pruning the same tensors in memory, bit for bit.

    The weights are read three times: for the threshold, to count, and to write. Memory holds a few pieces of them,
    however large the checkpoint is. The source is never touched; what is written appears under its name when it is
    whole.

    Args:
        src: a `.safetensors` file, a folder of shards with their index, or a file of `torch.save`.
        dst: a `.safetensors` file, or a folder if `src` is one; None only says what would be done.
        recipe: what to prune and how much.
        level: pack what is written, at this level (see `save`); None writes plain files.
        progress: called with the bytes of tensors read or written since the last call; `work` says how many in all.
        processes: those that share the work, shard by shard, each calling this alike; by default this one works alone.

    Returns:
        Each tensor that is pruned, with its zeros; and what was left as it is.

    Raises:
        InputError: a sparsity, level or source that cannot be used, NaN or inf in a weight, a count that cannot be
            met. UnknownNameError: a glob that matches nothing. PatternError: a tensor that the pattern does not fit.
            WriteError: the system refuses to write. In each case nothing was changed.
    """
    packing = None if level is None else level_of(level, None)
    checkpoint = opened(src)
    chosen, left = _chosen(checkpoint, recipe)
    here = {tensor.name for shard in mine(checkpoint, processes) for tensor in shard.tensors}
    with _one_thread():
        pruned = _pruned(chosen, recipe, here, progress, processes)
    said = (_said(pruned), *_untouched(left))
    if dst is None:
        infos = [info(of, done.zeros_left) for of, done in zip(chosen.values(), pruned.values(), strict=True)]
        return Contents(os.fspath(src), tuple(infos), sum(t.stored_bytes for t in infos), said)

    def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
        tensors = [_without(tensor, pruned) for tensor in shard.tensors]
        if packing is not None:
            coder = effort_of("normal")
            return write_packed(path, tensors, level=packing, effort=coder, metadata=shard.metadata, progress=progress)
        with _one_thread():
            write_plain(path, replace(shard, tensors=tuple(tensors), sha256=None), progress)
        return [info(tensor, 0, stored_bytes=tensor.nbytes) for tensor in tensors]

    rename = packed_file_name if packing is not None else plain_file_name
    written = rewrite(checkpoint, src, dst, rename, write, processes)
    tensors = _gathered(written, pruned, ("plain", "lossless", str(packing)), processes)
    return replace(written, tensors=tensors, notes=(*said, *written.notes))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: for pieces so small, passing the work around takes twice the time of doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def work(src: StrPath, recipe: Recipe) -> int:
    """Return the bytes of tensors that `prune_checkpoint` will read or write: what its `progress` adds up to."""
    checkpoint = opened(src)
    chosen, _ = _chosen(checkpoint, recipe)
    return 2 * sum(t.nbytes for t in chosen.values()) + sum(t.nbytes for t in checkpoint.tensors.values())


def _chosen(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors to prune, tied ones once, and why the others stay as they are."""
    tensors = checkpoint.tensors
    if recipe.pattern is not None and not isinstance(recipe.pattern, n_m):
        kind = type(recipe.pattern).__name__
        raise InputTypeError(f"pattern is a {kind}: give secateur.n_m(2, 4) or the like, the one that files take")
    for glob in (*recipe.only, *recipe.skip):
        if not any(matches(glob, name) for name in tensors):
            raise UnknownNameError(f"{glob!r} matches no tensor; {nearest(glob, tensors)}")
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.of.name if isinstance(tensor, Alias) else name, []).append(name)
    reasons = {name: _reason_against(tensor, names.get(name, []), recipe) for name, tensor in tensors.items()}
    chosen = {name: tensor for name, tensor in tensors.items() if not reasons[name]}
    left = {name: reason for name, reason in reasons.items() if reason}
    if not chosen:
        raise InputError("nothing to prune: " + "; ".join(f"{n}: {r}" for n, r in list(left.items())[:3]))
    for name, tensor in chosen.items():
        if tensor.dtype not in PRUNABLE:
            raise InputTypeError(f"{name} is {tensor.dtype}: only fp16, bf16, fp32, fp64 and complex can be pruned")
        if recipe.pattern is not None:
            recipe.pattern.check(name, tensor.shape, 1)
    return chosen, left


def _reason_against(tensor: Stored, names: Sequence[str], recipe: Recipe) -> str:
    """Why a tensor stays as it is, or an empty string; any one of its names is enough to choose or to skip it."""
    if isinstance(tensor, Alias):
        return tensor.coding
    if not tensor.numel():
        return "empty"
    if any(matches(glob, name) for glob in recipe.skip for name in names):
        return "skipped"
    if recipe.only and not any(matches(glob, name) for glob in recipe.only for name in names):
        return "not chosen"
    if any(name in recipe.only for name in names):
        return ""
    if len(tensor.shape) < 2:
        return "fewer than two dimensions"
    return "" if tensor.dtype in PRUNABLE else name_of(tensor.dtype)


def _pruned(
    chosen: Mapping[str, Stored],
    recipe: Recipe,
    here: Container[str],
    progress: Progress | None,
    processes: Processes,
) -> Mapping[str, _Pruned]:
    """Find what each tensor loses: nothing is written yet."""
    asked = fraction(recipe.sparsity)
    if recipe.pattern is not None:
        return _patterned(chosen, recipe.pattern, asked, here, progress, processes)
    if recipe.allocation not in _STREAMED:
        raise InputError(f"no allocation named {recipe.allocation!r} for files: choose {', '.join(_STREAMED)}")
    sizes = {name: tensor.numel() for name, tensor in chosen.items()}
    allocation = allocations.resolve(recipe.allocation)
    most = {name: allocation.most(size) for name, size in sizes.items()}
    count = half_up(asked * sum(sizes.values()))
    if count > sum(most.values()):
        raise InputError(
            f"{count:,} of {sum(sizes.values()):,} weights cannot go: each tensor keeps one at least, "
            f"leaving {sum(most.values()):,}; ask for less"
        )
    streams = [Stream(name, _watched(t, progress), magnitude, here=name in here) for name, t in chosen.items()]
    tally = partial(_tally, processes=processes)
    if allocation.share is None:
        cuts = selection.together(streams, count, most, tally, processes.total)
    else:
        bounds = {name: (0, most[name]) for name in sizes}
        # an allocation that is streamed looks at shapes only
        counts = allocations.shared(allocation, cast(Mapping[str, Tensor], chosen), bounds, count)
        cuts = {}
        for stream in streams:
            if stream.here and not counts[stream.name]:  # for the others the threshold sees to that
                selection.require_finite(stream.name, stream.values)
            cut = selection.threshold([stream], counts[stream.name], total=processes.total)
            cuts[stream.name] = tally([stream], cut)[stream.name][0]
    if processes.rank == 0:
        warn_of_collapse({name: lost for name, (lost, _, _) in cuts.items()}, sizes)
    return {name: _Ranked(tensor, *cuts[name]) for name, tensor in chosen.items()}


def _tally(streams: Sequence[Stream], cut: Cut, *, processes: Processes) -> Applied[tuple[int, int, Cut]]:
    """Apply a cut to streams in their order: what each loses, what is zero then, its cut with its share of the ties."""
    counts = np.zeros((len(streams), 3), np.int64)
    for row, stream in zip(counts, streams, strict=True):
        if stream.here:
            row[:] = selection.tally(stream, cut)
    ties = cut.ties
    found: Applied[tuple[int, int, Cut]] = {}
    for stream, (below, equal, zero) in zip(streams, processes.total(counts).tolist(), strict=True):
        taken = min(equal, ties)
        ties -= taken
        lost = below + taken
        found[stream.name] = (lost, max(lost, zero), replace(cut, ties=taken)), lost
    return found


def _patterned(
    chosen: Mapping[str, Stored],
    pattern: n_m,
    asked: Fraction,
    here: Container[str],
    progress: Progress | None,
    processes: Processes,
) -> Mapping[str, _Pruned]:
    if abs(asked - pattern.sparsity) > Fraction(1, 1000):
        raise InputError(
            f"the pattern {pattern} makes a sparsity of {float(pattern.sparsity):g}; asked was {float(asked):g}"
        )
    zeros = np.zeros(len(chosen), np.int64)
    for i, (name, tensor) in enumerate(chosen.items()):
        if name in here:
            selection.require_finite(name, _watched(tensor, progress))
            zeros[i] = _Patterned(_watched(tensor, progress), pattern, 0).zeros()
    counts = processes.total(zeros).tolist()
    return {name: _Patterned(chosen[name], pattern, zero) for name, zero in zip(chosen, counts, strict=True)}


def _without(tensor: Stored, pruned: Mapping[str, _Pruned]) -> Stored:
    if isinstance(tensor, Alias):
        return Alias(tensor.name, pruned.get(tensor.of.name, tensor.of))
    return pruned.get(tensor.name, tensor)


def _said(pruned: Mapping[str, _Pruned]) -> str:
    weights, lost = sum(t.numel() for t in pruned.values()), sum(t.lost for t in pruned.values())
    zeros = sum(t.zeros_left for t in pruned.values())
    more = f", and {zeros - lost:,} others were zero already" if zeros > lost else ""
    return f"{lost:,} of {weights:,} weights in scope pruned ({percent(lost / weights)}){more}"


def _untouched(left: Mapping[str, str]) -> Iterator[str]:
    for reason in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == reason]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield f"{len(names)} as they are, {reason}: {shown}"


def _gathered(
    written: Contents, pruned: Mapping[str, _Pruned], codings: Sequence[str], processes: Processes
) -> tuple[TensorInfo, ...]:
    """The facts of each pruned tensor, whichever process wrote it."""
    own = {done.name: done for done in written.tensors}
    numbers = np.zeros((len(pruned), 4))
    for row, name in zip(numbers, pruned, strict=True):
        if name in own:
            of = own[name]
            row[:] = codings.index(of.coding), of.stored_bytes, of.error is not None, of.error or 0.0
    facts = zip(pruned.values(), processes.total(numbers).tolist(), strict=True)
    return tuple(
        info(
            done, done.zeros_left, coding=codings[int(coding)], stored_bytes=int(stored), error=error if lossy else None
        )
        for done, (coding, stored, lossy, error) in facts
    )


def _watched(tensor: Stored, progress: Progress | None) -> Stored:
    return tensor if progress is None else _Watched(tensor, progress)


class _Watched(Stored):
    """A tensor of which it is told how much has been read."""

    def __init__(self, of: Stored, progress: Progress) -> None:
        super().__init__(of.name, of.dtype, of.shape)
        self._of = of
        self._progress = progress

    def pieces(self, count: int) -> Iterator[Tensor]:
        for piece in self._of.pieces(count):
            yield piece
            self._progress(piece.nbytes)

    def at(self, indices: npt.NDArray[np.int64]) -> Tensor:
        return self._of.at(indices)


class _Pruned(Stored):
    """A tensor of which some weights are read as +0.0.

    Attributes:
        lost: weights pruned.
        zeros_left: weights that are zero afterwards.
    """

    def __init__(self, of: Stored, lost: int, zeros: int) -> None:
        super().__init__(of.name, of.dtype, of.shape)
        self._of = of
        self.lost = lost
        self.zeros_left = zeros


class _Ranked(_Pruned):
    """Pruned below a cut, as `selection.keep` and `Masks.apply` do in memory."""

    def __init__(self, of: Stored, lost: int, zeros: int, cut: Cut) -> None:
        super().__init__(of, lost, zeros)
        self._cut = cut

    def pieces(self, count: int) -> Iterator[Tensor]:
        ties = self._cut.ties
        room = torch.empty(min(count, self.numel()), dtype=self.dtype)
        for piece in self._of.pieces(count):
            out = room[: piece.numel()]
            for raw, pruned in zip(parts(piece, bits.CHUNK), parts(out, bits.CHUNK), strict=True):
                kept, ties = selection.above(raw.abs().to(self._cut.dtype), self._cut.value, ties)
                _zero(raw, kept, pruned)
            yield out


class _Patterned(_Pruned):
    """Pruned to a pattern, some rows at a time."""

    def __init__(self, of: Stored, pattern: n_m, zeros: int) -> None:
        super().__init__(of, pattern.legal(of.shape, 1), zeros)
        self._pattern = pattern

    def pieces(self, count: int) -> Iterator[Tensor]:
        return regrouped(self._rows(), count)

    def _rows(self) -> Iterator[Tensor]:
        row = max(self.shape[1:].numel(), 1)
        for piece in regrouped(self._of.pieces(bits.CHUNK), max(bits.CHUNK // row, 1) * row):
            scores = piece.view(-1, *self.shape[1:]).abs()
            kept = self._pattern.reduce(scores.float() if scores.itemsize < 4 else scores, 1) == math.inf
            _zero(piece, kept.view(-1), piece)
            yield piece


def _zero(values: Tensor, kept: Tensor, out: Tensor) -> None:
    """Copy flat values, those that are not kept as +0.0: a bitwise AND with words of ones or zeros."""
    words = words_of(values).reshape(values.numel(), -1)  # two words to a complex number
    ones = -kept.numpy().view(np.uint8).astype(words.dtype)
    np.bitwise_and(words, ones[:, None], out=words_of(out).reshape(words.shape))
