"""What a file holds, tensor by tensor: what `inspect` finds and what `save`, `pack` and `prune` report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.storage.dtypes import name_of
from secateur.storage.stored import Stored
from secateur.support.tables import Printed, Table, counted, number, percent, size


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name, dtype, shape: of the tensor.
        weights: its elements, of which `zeros` are zero.
        bytes: that it takes in memory.
        coding: how it is stored: "plain", the level it is packed at, or the tensor it is tied to.
        stored_bytes: that it takes in the file.
        error: L2 norm of what was lost in storing it, relative to that of the tensor; None if nothing can be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    bytes: int
    coding: str = "plain"
    stored_bytes: int = 0
    error: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0.0 for an empty tensor."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def ratio(self) -> float:
        """Bytes in the file over bytes in memory; 1.0 for an empty tensor."""
        return self.stored_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class Contents(Printed):
    """What a checkpoint holds; prints as a table.

    Attributes:
        path: of the file or folder.
        tensors: one by one.
        file_bytes: of the file, or of all shards together, headers included.
        notes: what else one should know.
        dense_bytes: that all tensors of the file take in memory, where more are in it than are listed here.
    """

    path: str
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    notes: tuple[str, ...] = ()
    dense_bytes: int = 0

    @property
    def total(self) -> TensorInfo:
        """All tensors together; one that is stored under two names counts twice. If they are the whole file, its
        headers too.
        """
        keys = "weights", "zeros", "bytes", "stored_bytes"
        weights, zeros, bytes_, stored = (sum(getattr(t, key) for t in self.tensors) for key in keys)
        stored = stored if self.dense_bytes > bytes_ else self.file_bytes
        return TensorInfo(f"total ({counted(len(self.tensors), 'tensor')})", "", (), weights, zeros, bytes_, "", stored)

    @property
    def ratio(self) -> float:
        """Bytes of the file over those of all its tensors in memory, also those that are not listed."""
        dense = max(self.dense_bytes, self.total.bytes)
        return self.file_bytes / dense if dense else 1.0

    def table(self) -> Table:
        """One row a tensor, then the total; how and how small where something is packed, what was lost where it is."""
        packed = any(t.coding != "plain" for t in self.tensors)
        lossy = any(t.error is not None for t in self.tensors)
        header = ["tensor", "dtype", "shape", "weights", "zeros", "sparsity", "size"]
        header += ["coding", "stored", "ratio"] * packed + ["error"] * lossy
        rows, notes = [_row(t, packed, lossy) for t in (*self.tensors, self.total)], self.notes
        if packed and self.dense_bytes > self.total.bytes:
            of = f"{self.ratio:.2f} of the {size(self.dense_bytes)} of all its tensors"
            notes = (f"the file takes {size(self.file_bytes)}, {of}", *notes)
        return Table(header, rows, self.path, notes)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON: path, tensors, total, file, notes."""
        tensors = [
            {**asdict(t), "shape": list(t.shape), "sparsity": t.sparsity, "ratio": t.ratio} for t in self.tensors
        ]
        keys = "weights", "zeros", "sparsity", "bytes", "stored_bytes", "ratio"
        total = {key: getattr(self.total, key) for key in keys}
        file = {"bytes": max(self.dense_bytes, self.total.bytes), "stored_bytes": self.file_bytes, "ratio": self.ratio}
        return {"path": self.path, "tensors": tensors, "total": total, "file": file, "notes": list(self.notes)}


def info(tensor: Stored, zeros: int, **written: Any) -> TensorInfo:
    """Return the facts of a tensor; those of one that was just written differ in `coding`, `stored_bytes`, `error`."""
    facts = {"coding": tensor.coding, "stored_bytes": tensor.stored_bytes, **written}
    shape = tuple(tensor.shape)
    return TensorInfo(tensor.name, name_of(tensor.dtype), shape, tensor.weights, zeros, tensor.nbytes, **facts)


def notes(names: Sequence[str]) -> tuple[str, ...]:
    """Say what the names of the tensors tell: some may be pruned with torch.nn.utils.prune."""
    known = set(names)
    pruned = [n for n in names if n.endswith("_orig") and n.removesuffix("_orig") + "_mask" in known]
    note = (
        f"{counted(len(pruned), 'tensor (_orig, _mask) is', 'tensors (_orig, _mask) are')} pruned with "
        "torch.nn.utils.prune: to make them plain, use secateur.from_torch_prune(model) or "
        "secateur.torch_prune.plain_state_dict(state_dict)"
    )
    return (note,) if pruned else ()


def _row(t: TensorInfo, packed: bool, lossy: bool) -> list[str]:
    shape = " x ".join(map(str, t.shape))
    cells = [t.name, t.dtype, shape, number(t.weights), number(t.zeros), percent(t.sparsity), size(t.bytes)]
    cells += [t.coding, size(t.stored_bytes), f"{t.ratio:.4f}"] * packed
    return cells + ["" if t.error is None else f"{t.error:.2g}"] * lossy
