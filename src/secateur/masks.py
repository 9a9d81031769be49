"""Masks: which weights are kept, beside the model and never in it."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur import sharding
from secateur.computed_weights import effective, require_values, why_computed
from secateur.errors import InputError, InputTypeError, MaskError, StateError, UnknownNameError, nearest
from secateur.exchange import BLOCK, Exchange, Part
from secateur.scope import unwrap, weights
from secateur.sharding import Spread
from secateur.support import bits, checks
from secateur.support.files import refusals, replacing, require_file
from secateur.support.process_groups import ALONE, during, shared
from secateur.support.tables import counted

FORMAT = "secateur.masks"
"""What the metadata of a file of masks says of its format."""


class Masks(Mapping[str, Tensor]):
    """For each pruned tensor, by its name in the model, which weights are kept: one bit a weight.

    Reads as `dict[str, BoolTensor]` (True = kept); each look-up unpacks a fresh tensor.

    Args:
        kept: a boolean tensor of the weight's shape for each name.

    Raises:
        InputTypeError: no dict of names, or a tensor that is not boolean.

    >>> masks = Masks({"fc.weight": torch.tensor([[True, False, False, True]])})
    >>> masks.sparsity, masks["fc.weight"].tolist()
    (0.5, [[True, False, False, True]])
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        if not isinstance(kept, Mapping):
            raise checks.wrong("kept", kept, "a dict of bool tensors by name")
        for name, mask in kept.items():
            if not isinstance(name, str):
                raise checks.wrong("a name in kept", name, "the name of a tensor, as model.named_parameters() has it")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InputTypeError(f"the mask of {name} is {what}: give a bool tensor, True = kept")
        packed = {name: bits.pack(bits.local(mask)) for name, mask in kept.items()}
        self._hold(packed, {name: mask.shape for name, mask in kept.items()}, sharding.spread(kept))

    @classmethod
    def from_bits(
        cls, packed: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], spread: Spread | None = None
    ) -> Masks:
        """Build from bits already packed as `secateur.support.bits` does; `packed` and `shapes` have the same names.

        Args:
            packed: the bits, or those of the part that is here.
            shapes: of the whole tensors.
            spread: how they are spread over processes, all of which make the same masks at once.
        """
        masks = cls({})
        masks._hold(packed, {name: torch.Size(shapes[name]) for name in packed}, spread)
        return masks

    def _hold(self, packed: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], spread: Spread | None) -> None:
        self._bits, self._shapes, self._spread = dict(packed), dict(shapes), spread
        # counted now, so that later one process may ask by itself
        self._pruned: dict[str, int] | None = None
        self._sums: dict[str, int] = {}
        if spread is not None:
            self._pruned, self._sums = spread.counted(self._pruned_here(), self._marks())

    def _pruned_here(self) -> dict[str, int]:
        sizes = {name: math.prod(self._part(name)) for name in self._bits}
        return {name: sizes[name] - bits.count(packed) for name, packed in self._bits.items()}

    def _marks(self) -> dict[str, int]:
        """Checksums, by which copies that differ are found."""
        return {name: zlib.crc32(packed.cpu().numpy().data) for name, packed in self._bits.items()}

    def _part(self, name: str) -> tuple[int, ...]:
        """The shape of the part that is here."""
        return self._shapes[name] if self._spread is None else tuple(map(len, self._spread.places[name].index))

    @classmethod
    def from_zeros(cls, model: nn.Module | Mapping[str, Tensor]) -> Masks:
        """Take the zeros that are there now as pruned: in the default scope of a model, or in the tensors given."""
        if not isinstance(model, (nn.Module, Mapping)):
            raise checks.wrong("model", model, "a module, or a dict of tensors")
        tensors = weights(model) if isinstance(model, nn.Module) else model
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise checks.wrong(name, tensor, "tensors only")
        return cls({name: tensor.detach() != 0 for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        shape = self._part(name)
        mask = bits.unpack(self._bits[name], math.prod(shape)).view(shape)
        return mask if self._spread is None else self._spread.places[name].spread(mask)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def __eq__(self, other: object) -> bool:
        """Same names, shapes and bits, wherever they live; of sharded weights in all processes.

        Raises:
            MaskError: the parts lie otherwise than those of the other.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        if self._shapes != other._shapes:
            return False
        for name in self:
            other._require_layout(name, self._spread)
        return self._sums == other._sums and all(
            torch.equal(mine.cpu(), other._bits[name].cpu()) for name, mine in self._bits.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Masks:
        return self.named({name: name for name in self})

    def __deepcopy__(self, memo: object) -> Masks:
        masks = copy(self)
        masks._bits = {name: packed.clone() for name, packed in self._bits.items()}
        return masks

    def __getstate__(self) -> object:
        if self._spread is not None:
            raise StateError(
                "these masks are of parts, which mean nothing to another process: write them with masks.save(path) in "
                "all processes, or give Masks of the full_tensor() of each mask"
            )
        return vars(self)

    def __repr__(self) -> str:
        return f"Masks({counted(len(self), 'tensor')}, {self.pruned:,} of {counted(self.size, 'weight')} pruned)"

    def packed(self, name: str) -> Tensor:
        """Return the bits of one tensor, `uint8 [ceil(n / 8)]`: not a copy. Of a DTensor those of the part here."""
        return self._bits[name]

    def rows(self, name: str) -> Tensor:
        """Return the bits of one tensor row by row, `uint8 [rows, ceil(n / 8)]`, as a checkpoint keeps them.

        Of a DTensor they are a DTensor whose rows lie where those of the weight do; all processes ask for it.
        """
        mask = self[name]
        return bits.pack_rows(mask) if self._spread is None else self._spread.places[name].packed(mask)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of one tensor, without unpacking its mask."""
        return self._shapes[name]

    def is_spread(self, name: str) -> bool:
        """Whether these are masks of the part of a DTensor."""
        return self._spread is not None and self._spread.places[name].mesh is not None

    def lies_as(self, name: str, layout: tuple[Any, Any] | None) -> bool:
        """Whether the mask of a tensor is spread as a weight of this `sharding.layout` is, so that parts fit parts."""
        return (None if self._spread is None else self._spread.places[name].layout) == layout

    @property
    def size(self) -> int:
        """Weights under the masks, pruned or kept."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def pruned(self) -> int:
        """Weights pruned, in all."""
        return sum(self.counts().values())

    @property
    def sparsity(self) -> float:
        """Fraction of weights pruned, in all."""
        return self.pruned / self.size if self.size else 0.0

    def counts(self) -> dict[str, int]:
        """Weights pruned, tensor by tensor."""
        if self._pruned is None:
            self._pruned = self._pruned_here()
        return dict(self._pruned)

    def __and__(self, other: Masks) -> Masks:
        """Keep what both keep; a name that only one of them holds stays as it is there."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: Masks) -> Masks:
        """Keep what either keeps; a name that only one of them holds stays as it is there."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._combine(other, torch.bitwise_or)

    def _combine(self, other: Masks, join: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if other._spread is not None and self._spread is None:
            return other._combine(self, join)
        other = other.on(self._spread) if other._spread is None else other
        other._require_shapes(self._shapes)
        joined = {**other._bits, **self._bits}
        for name in self._bits.keys() & other._bits.keys():
            other._require_layout(name, self._spread)
            joined[name] = join(self._bits[name], other._bits[name].to(self._bits[name].device))
        spread = self._spread
        if spread is not None and other._spread is not None:
            spread = spread.beside(other._spread)
        return Masks.from_bits(joined, {**other._shapes, **self._shapes}, spread)

    def named(self, names: Mapping[str, str]) -> Masks:
        """The same masks under other names: `{new: old}`."""
        masks = Masks.from_bits(
            {name: self._bits[old] for name, old in names.items()},
            {name: self._shapes[old] for name, old in names.items()},
        )
        if self._spread is not None and self._pruned is not None:
            masks._spread = replace(self._spread, places={n: self._spread.places[old] for n, old in names.items()})
            masks._pruned = {name: self._pruned[old] for name, old in names.items()}
            masks._sums = {name: self._sums[old] for name, old in names.items()}
        return masks

    def on(self, spread: Spread | None) -> Masks:
        """The same masks of tensors that are spread over processes, which all call it.

        Raises:
            MaskError: as `require_on`; of another shape. InputError: other masks in another process.
        """
        self.require_on(spread)
        if spread is None or self._spread is not None:
            return self
        shapes = {name: torch.Size(place.shape) for name, place in spread.places.items()}
        sharding.agree(spread.grid, lambda: self._require_shapes(shapes), lambda _: {"masks": self._told()})
        spread = spread.with_whole(self._shapes)
        packed = {name: bits.pack(spread.places[name].part(self[name])) for name in self}
        return Masks.from_bits(packed, self._shapes, spread)

    def _require_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        for name in self._shapes.keys() & shapes.keys():
            if self._shapes[name] != shapes[name]:
                raise MaskError(
                    f"{name}: masks of shape {tuple(shapes[name])} and {tuple(self._shapes[name])} "
                    "cannot be combined: they are of different models"
                )

    def _told(self) -> dict[str, str]:
        marks = self._marks()
        return {name: f"{count} pruned (checksum {marks[name]:08x})" for name, count in self.counts().items()}

    def require_on(self, spread: Spread | None) -> None:
        """See that these are no masks of parts, or that the tensors are spread as they are.

        Raises:
            MaskError: the tensors are spread in another way.
        """
        for name in self if self._spread is not None else ():
            self._require_layout(name, spread)

    def _require_layout(self, name: str, spread: Spread | None) -> None:
        if not self.lies_as(name, None if spread is None else spread.places[name].layout):
            raise MaskError(
                f"the mask of {name} is of parts that lie otherwise than those it is to be used with: give Masks of "
                "the full_tensor() of each mask"
            )

    def to(self, device: torch.device | str) -> Masks:
        """Return the same masks with their bits on `device`."""
        masks = copy(self)
        masks._bits = {name: packed.to(device) for name, packed in self._bits.items()}
        return masks

    def apply(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Set the pruned weights of a model, or of a state_dict, to +0.0 in place (inf and NaN too).

        Raises:
            UnknownNameError, MaskError: the masks are for another model; nothing was changed.
        """
        zero, tensors = bits.Zeroer(), _agreed(model, self, self.writable)
        here = self.on(sharding.spread(tensors))
        for name, tensor in tensors.items():
            zero(tensor, here.packed(name))

    def writable(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `match`, and see that single weights can be set.

        Raises:
            InputTypeError: a tensor that is quantized or sparse.
        """
        matched = self.match(model)
        for name, tensor in matched.items():
            if tensor.layout is not torch.strided:
                layout = str(tensor.layout).removeprefix("torch.")
                raise InputTypeError(f"{name} is stored as {layout}, which masks do not change: use its .to_dense()")
            if bits.is_quantized(tensor):
                raise InputTypeError(
                    f"{name} is quantized, and no weight of it can be set by itself: prune before quantizing"
                )
        return matched

    def match(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Find each masked tensor in a model or state_dict, and see that the shapes agree.

        Raises:
            UnknownNameError: a name that is not there; MaskError: a shape that differs.
        """
        if isinstance(model, Mapping):
            return self._match(model)
        plain = unwrap(model)
        found = dict(plain.named_parameters(remove_duplicate=False))
        self._require_plain(plain, found)
        return self._match(found)

    def read(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `match`, but each tensor is what the model computes with, to be read only.

        So it also finds weights that are quantized, and those under masks of `torch.nn.utils.prune`.
        """
        if isinstance(model, Mapping):
            return {name: bits.plain(tensor) for name, tensor in self._match(model).items()}
        found = effective(unwrap(model))
        self._require_plain(unwrap(model), found)
        return self._match(found)

    def _require_plain(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        for name in self._shapes:
            if name not in found and (why := why_computed(model, name)):
                raise UnknownNameError(why)

    def _match(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matched = {}
        for name, shape in self._shapes.items():
            if f"{name}_orig" in found:
                raise UnknownNameError(
                    f"{name} is under a mask of torch.nn.utils.prune, which renames it: make the model plain first "
                    "with sc.from_torch_prune(model), or the state_dict with sc.plain_state_dict(state_dict)"
                )
            if name not in found:
                raise UnknownNameError(f"these masks are for another model: it has no {name}; {nearest(name, found)}")
            if not isinstance(found[name], Tensor):
                raise checks.wrong(name, found[name], "a state_dict, whose weights are tensors")
            require_values(name, found[name])
            if found[name].shape != shape:
                raise MaskError(
                    f"these masks are for another model: {name} has shape {tuple(found[name].shape)}, "
                    f"its mask {tuple(shape)}"
                )
            matched[name] = found[name]
        return matched

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file of one bit a weight; an old file stays until the new one is whole.

        The same masks give the same bytes, in whatever order they were made. Those of sharded weights are saved by all
        processes of the mesh, which call this alike; the first one writes them, as those of the whole weights.

        Raises:
            InputError: a name that no file can hold; processes that do not call it alike. WriteError: the system
                refuses to write. Of several processes what one raises, all raise. GroupError: a process was lost.
        """
        grid = None if self._spread is None else self._spread.grid
        with during("masks were saved"):
            told = {"masks": {name: list(shape) for name, shape in self._shapes.items()}}
            header = sharding.agree(grid, lambda: self._header(path), lambda _: {"path": os.path.abspath(path), **told})
            exchange = None
            if self._spread is not None:
                parts = {name: Part(torch.bool, partial(self._some, name)) for name in self}
                exchange = Exchange(parts, self._spread)

            def write() -> None:
                with refusals(path), open(temporary, "wb") as file:
                    file.write(header)
                    for name in sorted(self):
                        for piece in self._pieces(name, exchange):
                            file.write(piece.cpu().contiguous().numpy().data)

            with shared(replacing(path), grid or ALONE) as temporary:
                if exchange is None:
                    write()
                else:
                    exchange.run(write if exchange.grid.rank == 0 else lambda: None)

    def _header(self, path: str | os.PathLike[str]) -> bytes:
        checks.path("path", path)
        names = sorted(self)
        shapes = json.dumps({name: list(self._shapes[name]) for name in names})
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": "1", "shapes": shapes}}
        stop = 0
        for name in names:
            start, stop = stop, stop + -(-self._shapes[name].numel() // 8)
            header[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        try:
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"no file holds a mask whose name has {error.object[error.start]!r}: rename it") from error
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text

    def _pieces(self, name: str, exchange: Exchange | None) -> Iterator[Tensor]:
        """The bits of a whole tensor, of which the part here may hold only some."""
        if exchange is None:
            yield self._bits[name]
            return
        size = self._shapes[name].numel()
        for first in range(0, size, BLOCK):
            yield bits.pack(exchange.block(name, first, min(first + BLOCK, size)))

    def _some(self, name: str, start: int, stop: int) -> Tensor:
        """Part of the mask that is here, flat."""
        first = start // 8 * 8
        return bits.unpack(self._bits[name], stop - first, first)[start - first :].cpu()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file. MaskError: it is not one of masks, or is damaged.
        """
        require_file(checks.path("path", path))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("version") != "1":
                    raise MaskError(f"{path} holds no masks of version 1: give a file that Masks.save wrote")
                shapes = {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
                packed = {name: file.get_tensor(name) for name in shapes}
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            if isinstance(error, MaskError):
                raise
            raise MaskError(f"{path} cannot be read as masks ({error}): give a file that Masks.save wrote") from error
        for name, shape in shapes.items():
            whole, spare = divmod(math.prod(shape), 8)
            fits = min(shape, default=0) >= 0 and math.prod(max(n, 1) for n in shape) < 2**63
            fits = fits and packed[name].dtype == torch.uint8 and packed[name].shape == (whole + bool(spare),)
            if not fits or (spare and int(packed[name][-1]) >> spare):
                raise MaskError(f"{path} is damaged: {name} does not hold the bits of shape {tuple(shape)}")
        return cls.from_bits(packed, shapes)


def as_masks(given: object) -> Masks:
    """Masks, or a dict of boolean tensors, as masks.

    Raises:
        InputTypeError: anything else.
    """
    if isinstance(given, Masks):
        return given
    if not isinstance(given, Mapping):
        raise InputTypeError(f"masks is {checks.kind(given)}: give what sc.prune returned, or a dict of bool tensors")
    return Masks(given)


def check(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Name the tensors whose zeros came back, each with the number of pruned weights that are not zero.

    An empty dict means that every pruned weight is zero. Quantized weights count as the numbers they stand for.

    Raises:
        UnknownNameError, MaskError: the masks are for another model, or a weight is computed by a norm now.
        InputTypeError: no masks.
    """
    masks = as_masks(masks)
    with during("zeros were looked at, which all processes do together"):
        tensors = _agreed(model, masks, masks.read)
        masks = masks.on(sharding.spread(tensors))
        found = {name: bits.alive(tensor, masks.packed(name).to(tensor.device)) for name, tensor in tensors.items()}
        return {name: count for name, count in sharding.total(tensors, found).items() if count}


def _agreed(
    model: nn.Module | Mapping[str, Tensor],
    masks: Masks,
    find: Callable[[nn.Module | Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The masked tensors of a model, as `find` finds them; what one process cannot do with its part, none does."""
    where = unwrap(model) if isinstance(model, nn.Module) else model if isinstance(model, Mapping) else {}

    def found() -> dict[str, Tensor]:
        tensors = find(model)
        masks.require_on(sharding.spread(tensors))
        return tensors

    return sharding.alike(where, found, lambda tensors: {"masks of": [*tensors]})


def remask(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Set the pruned weights to zero again: after a LoRA merge, `load_state_dict`, an EMA, an edit by hand.

    Returns:
        For each tensor the L2 norm of what was removed, relative to the norm of the tensor before.

    Raises:
        UnknownNameError, MaskError: the masks are for another model, or a weight is computed by a norm now.
        InputTypeError: no masks. In each case nothing was changed.
    """
    masks = as_masks(masks)
    tensors = _agreed(model, masks, masks.writable)
    masks = masks.on(sharding.spread(tensors))
    gone, whole = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    for name, tensor in tensors.items():
        packed = masks.packed(name).to(tensor.device)
        for start, piece in bits.chunks(tensor.detach()):
            squares = piece.abs().double().square()
            kept = bits.unpack(packed, piece.numel(), start)
            gone[name] += float(squares[~kept].sum())
            whole[name] += float(squares.sum())
    gone, whole = sharding.total(tensors, gone), sharding.total(tensors, whole)
    masks.apply(tensors)
    return {name: (gone[name] / whole[name]) ** 0.5 if whole[name] else 0.0 for name in tensors}
