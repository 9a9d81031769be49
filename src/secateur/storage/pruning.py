"""Prune a checkpoint that may be larger than memory, without the code of its model: in streaming passes, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur import allocation as allocations
from secateur import patterns, plan, selection
from secateur.allocation import Allocation
from secateur.errors import InputError, InputTypeError, UnknownNameError, listed, nearest
from secateur.patterns import Pattern
from secateur.scope import PRUNABLE, matches
from secateur.scores import magnitude
from secateur.selection import Cut
from secateur.sparsity import Sparsity, explicit
from secateur.storage.checkpoints import Checkpoint, Shard, opened
from secateur.storage.coding import effort_of, level_of
from secateur.storage.contents import Contents, TensorInfo, info
from secateur.storage.conversion import packed_file_name, plain_file_name, rewrite, target_of, write_plain
from secateur.storage.dtypes import name_of, words_of
from secateur.storage.sharing import mine
from secateur.storage.stored import Alias, Stored, parts, regrouped
from secateur.storage.writing import Progress, write_packed
from secateur.streams import Stream, require_finite
from secateur.support import bits, checks
from secateur.support.files import StrPath
from secateur.support.process_groups import ALONE, Processes
from secateur.support.tables import percent


@dataclass(frozen=True)
class Recipe:
    """What to prune, and how much of it, by magnitude.

    Attributes:
        sparsity: as for `secateur.prune`: a fraction of the chosen weights, met to one weight, 0 <= s < 1; or
            `{glob: fraction}`, or `secateur.Count(n)`.
        allocation: one that looks at shapes only, or its name: "global" (all ranked together), "uniform", "erk".
        pattern: one that can be laid on some outputs at a time, or its name: "2:4" (at most 2 of every 4 weights along
            the second dimension stay), "rows" (along the first); None is free. A file does not say which dimensions
            are outputs: the first is taken to be.
        only, skip: globs on the names of tensors; by default each floating-point tensor of two or more dimensions
            is pruned. A name in full takes whatever it names, a bias too.
    """

    sparsity: Sparsity
    allocation: str | Allocation = "global"
    pattern: str | Pattern | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("only", "skip"):  # one glob may stand alone, as for `secateur.weights`
            globs = getattr(self, name)
            if not isinstance(globs, str):
                checks.several(name, globs, "globs on the names of tensors, such as ('encoder.*',)")
            globs = (globs,) if isinstance(globs, str) else tuple(globs)
            for glob in globs:
                if not isinstance(glob, str):
                    raise checks.wrong(name, glob, "globs on the names of tensors, such as ('encoder.*',)")
            object.__setattr__(self, name, globs)


def prune_checkpoint(
    src: StrPath | Checkpoint,
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
        InputTypeError: an argument of another type.
        InputError: a sparsity, level, source or target that cannot be used, NaN or inf in a weight, a count that
            cannot be met. UnknownNameError: a glob that matches nothing. PatternError: a tensor that the pattern
            does not fit. WriteError: the system refuses to write. In each case nothing was changed.
    """
    packing = None if level is None else level_of(level, None)
    if progress is not None:
        checks.function("progress", progress, "a function of the bytes done")
    checkpoint = opened(src)
    rename = packed_file_name if packing is not None else plain_file_name
    if dst is not None:
        target_of(checkpoint, dst, rename)  # seen before the weights are read
    chosen, left = _chosen(checkpoint, recipe)
    here = {tensor.name for shard in mine(checkpoint, processes) for tensor in shard.tensors}
    with _one_thread():
        pruned = _pruned(chosen, recipe, here, progress, processes)
    said = (_said(pruned), *_untouched(left))
    if dst is None:
        infos = [info(of, done.zeros_left) for of, done in zip(chosen.values(), pruned.values(), strict=True)]
        said = (*said, *checkpoint.notes)
        return Contents(str(checkpoint.path), tuple(infos), sum(t.stored_bytes for t in infos), said)

    def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
        tensors = [_without(tensor, pruned) for tensor in shard.tensors]
        if packing is not None:
            coder = effort_of("normal")
            return write_packed(path, tensors, level=packing, effort=coder, metadata=shard.metadata, progress=progress)
        with _one_thread():
            write_plain(path, replace(shard, tensors=tuple(tensors), sha256=None), progress)
        return [info(tensor, 0, stored_bytes=tensor.nbytes) for tensor in tensors]

    written = rewrite(checkpoint, dst, rename, write, processes)
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


def work(src: StrPath | Checkpoint, recipe: Recipe) -> int:
    """Return the bytes of tensors that `prune_checkpoint` will read or write, which its `progress` counts."""
    checkpoint = opened(src)
    chosen, _ = _chosen(checkpoint, recipe)
    return 2 * sum(t.nbytes for t in chosen.values()) + sum(t.nbytes for t in checkpoint.tensors.values())


def _chosen(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors to prune, tied ones once, and why the others stay as they are."""
    if not isinstance(recipe, Recipe):
        raise checks.wrong("recipe", recipe, "a secateur.storage.Recipe, such as Recipe(0.9)")
    tensors, pattern = checkpoint.tensors, patterns.for_files(recipe.pattern)
    for glob in (*recipe.only, *recipe.skip):
        if not any(matches(glob, name) for name in tensors):
            raise UnknownNameError(f"{glob!r} matches no tensor; {nearest(glob, tensors)}")
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.of.name if isinstance(tensor, Alias) else name, []).append(name)
    reasons = {name: _reason_against(tensor, names.get(name, []), recipe) for name, tensor in tensors.items()}
    chosen = {name: tensor for name, tensor in tensors.items() if not reasons[name]}
    left = {name: reason for name, reason in reasons.items() if reason}
    if chosen and isinstance(recipe.sparsity, Mapping):
        wanted = explicit(recipe.sparsity, list(chosen))
        left |= dict.fromkeys([name for name in chosen if name not in wanted], "no sparsity is given for them")
        chosen = {name: chosen[name] for name in wanted}
    if not chosen:
        raise InputError("nothing to prune: " + "; ".join(f"{n or repr(n)}: {r}" for n, r in list(left.items())[:3]))
    for name, tensor in chosen.items():
        if tensor.dtype not in PRUNABLE:
            raise InputTypeError(f"{name} is {tensor.dtype}: only fp16, bf16, fp32, fp64 and complex can be pruned")
        if pattern is not None:
            pattern.check(name, tensor.shape)
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
    allocation, pattern = allocations.for_files(recipe.allocation), patterns.for_files(recipe.pattern)
    sizes = {name: tensor.numel() for name, tensor in chosen.items()}
    legal = sizes if pattern is None else {name: pattern.legal(tensor.shape) for name, tensor in chosen.items()}
    group = {name: 1 if pattern is None else pattern.group(tensor.shape) for name, tensor in chosen.items()}
    most = {name: min(allocation.most(sizes[name]), legal[name]) // group[name] * group[name] for name in sizes}
    asked = plan.shares(recipe.sparsity, sizes, pattern, lambda names: sum(legal[name] for name in names))
    budgets = []
    for share in asked:
        bounds = {name: (0, most[name]) for name in share.names}
        # an allocation for files looks at shapes only, which a stored tensor has too
        weights = cast(Callable[[str], Tensor], chosen.__getitem__)
        budgets += plan.budget(bounds, share.count(share.sparsity), allocation, weights, pattern=pattern)
    grouped = any(size > 1 for size in group.values())
    for each in budgets:  # where the selection does not see that all are finite as it reads them
        for name in each.told if (pattern is not None and not grouped) or not each.count else ():
            if name in here:
                require_finite(name, _watched(chosen[name], progress))

    def stream(name: str, told: int) -> Stream:
        values, mine = _watched(chosen[name], progress), name in here
        if pattern is None:
            return Stream(name, values, magnitude, here=mine)
        reduced = _Reduced(values, _Laid(pattern, told))
        if not grouped:
            return Stream(name, reduced, here=mine, legal=legal[name] if pattern.sparsity is not None else None)
        scores = reduced.tensor() if mine else torch.zeros(reduced.shape, dtype=reduced.dtype)
        if not bool(scores.isfinite().all()):
            require_finite(name, chosen[name])
        return Stream(name, scores, group=group[name], here=mine)

    cuts = plan.choose(budgets, stream, most, _tally, processes)
    tallied = {name: cuts[name] for name in chosen}  # the order of the checkpoint
    told = {name: n for each in budgets for name, n in each.told.items()}
    if pattern is None:
        found: dict[str, _Pruned] = {
            name: _Ranked(chosen[name], lost, max(lost, zero), cut) for name, (cut, lost, zero) in tallied.items()
        }
    else:
        laid = {
            name: _Patterned(chosen[name], lost * group[name], 0, _Laid(pattern, told[name]), cut)
            for name, (cut, lost, _) in tallied.items()
        }
        zeros = np.array([_watched(t, progress).zeros() if n in here else 0 for n, t in laid.items()], np.int64)
        for tensor, left in zip(laid.values(), processes.total(zeros).tolist(), strict=True):
            tensor.zeros_left = left
        found = {**laid}
    if processes.rank == 0 and not allocation.allow_empty:
        plan.warn_of_collapse({name: done.lost for name, done in found.items()}, sizes)
    return found


def _tally(stream: Stream, cut: Cut) -> tuple[Cut, int, int]:
    """Apply a cut to a stream: the cut, what goes of it, and what is zero."""
    if not stream.here:
        return cut, 0, 0
    if cut.value == math.inf and stream.legal is not None:
        return cut, stream.legal, 0
    return cut, *selection.tally(stream, cut)


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
        yield f"{len(names)} as they are, {reason}: {listed(names)}"


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
    """A tensor that reports how much of it has been read."""

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
        stream, start = Stream(self.name, self._of), 0
        room = torch.empty(min(count, self.numel()), dtype=self.dtype)
        for piece in self._of.pieces(count):
            out = room[: piece.numel()]
            for raw, pruned in zip(parts(piece, bits.CHUNK), parts(out, bits.CHUNK), strict=True):
                kept = selection.above(raw.abs().to(self._cut.dtype), stream, self._cut, start)
                _zero(raw, kept, pruned)
                start += raw.numel()
            yield out


class _Patterned(_Pruned):
    """Pruned to a pattern, some outputs at a time."""

    def __init__(self, of: Stored, lost: int, zeros: int, laid: _Laid, cut: Cut) -> None:
        super().__init__(of, lost, zeros)
        self._laid = laid
        self._cut = cut

    def pieces(self, count: int) -> Iterator[Tensor]:
        return regrouped(self._blocks(), count)

    def _blocks(self) -> Iterator[Tensor]:
        stream, start = Stream(self.name, _Reduced(self._of, self._laid)), 0
        for block, scores in self._laid.blocks(self._of):
            kept = selection.above(scores.flatten().to(self._cut.dtype), stream, self._cut, start)
            start += scores.numel()
            flat = block.view(-1)
            _zero(flat, self._laid.pattern.expand(kept, block.shape).reshape(-1), flat)
            yield flat


@dataclass(frozen=True)
class _Laid:
    """A pattern laid on a tensor that is read some outputs at a time.

    Attributes:
        told: what the pattern is told of the whole tensor.
    """

    pattern: Pattern
    told: int

    def blocks(self, of: Stored) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some outputs of a tensor, and the scores of their groups; both last until the next."""
        outputs, *rest = of.shape
        row = max(math.prod(rest), 1)
        for piece in regrouped(of.pieces(bits.CHUNK), max(bits.CHUNK // row, 1) * row):
            block = piece.view(-1, *rest)
            scores = block.abs()
            scores = scores.float() if scores.itemsize < 4 else scores
            yield block, self.pattern.reduce(scores, -(-self.told * len(block) // outputs))


class _Reduced(Stored):
    """The scores of the groups of a tensor, by magnitude."""

    def __init__(self, of: Stored, laid: _Laid) -> None:
        wide = of.dtype.to_real() is torch.float64
        groups = of.numel() // laid.pattern.group(of.shape)
        super().__init__(of.name, torch.float64 if wide else torch.float32, torch.Size([groups]))
        self._of = of
        self._laid = laid

    def pieces(self, count: int) -> Iterator[Tensor]:
        return regrouped((scores.flatten() for _, scores in self._laid.blocks(self._of)), count)


def _zero(values: Tensor, kept: Tensor, out: Tensor) -> None:
    """Copy flat values, those that are not kept as +0.0: a bitwise AND with words of ones or zeros."""
    words = words_of(values).reshape(values.numel(), -1)  # two words to a complex number
    ones = -kept.numpy().view(np.uint8).astype(words.dtype)
    np.bitwise_and(words, ones[:, None], out=words_of(out).reshape(words.shape))
