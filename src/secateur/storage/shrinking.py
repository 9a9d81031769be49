"""Checkpoints cut by a plan, tensor by tensor, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.storage.checkpoints import Checkpoint, Shard, opened
from secateur.storage.contents import Contents, TensorInfo, info
from secateur.storage.conversion import plain_file_name, rewrite, write_plain
from secateur.storage.stored import Stored, parts
from secateur.structure.plan import Plan
from secateur.support import checks
from secateur.support.files import StrPath


class _Cut(Stored):
    """A tensor without what a plan removes of it; it is in memory while it is read."""

    def __init__(self, of: Stored, name: str, plan: Plan) -> None:
        shape = plan.cut(name, torch.empty(of.shape, dtype=of.dtype, device="meta")).shape
        super().__init__(name, of.dtype, shape)
        self._of = of
        self._plan = plan

    def pieces(self, count: int) -> Iterator[Tensor]:
        return parts(self._plan.cut(self.name, self._of.tensor()).view(-1), count)


def shrink_checkpoint(src: StrPath | Checkpoint, dst: StrPath, plan: Plan) -> Contents:
    """Cut a checkpoint by a plan; memory holds one of its tensors at a time.

    The config in a Hugging Face folder is copied as it is; `secateur shrink --hf FOLDER --plan PLAN` makes it follow.

    Args:
        src: as for `prune_checkpoint`.
        dst: a `.safetensors` file, or a folder if `src` is one; written plain.
        plan: of `secateur.structure.propose`, for the model whose state this is.

    Returns:
        Each tensor of the smaller state.

    Raises:
        InputTypeError: no plan. InputError: a source or target that cannot be used, or a plan that folds constants of
            other weights. MaskError: the state is of another model. WriteError: the system refuses to write. In each
            case nothing was changed.
    """
    if not isinstance(plan, Plan):
        raise checks.wrong("plan", plan, "what structure.propose returned, or structure.Plan.from_json(text)")
    checkpoint = opened(src)
    plan.check(checkpoint.tensors)

    def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
        named = [(tensor, plan.renamed(tensor.name)) for tensor in shard.tensors]
        tensors = tuple(_Cut(tensor, name, plan) for tensor, name in named if name is not None)
        write_plain(path, replace(shard, tensors=tensors, sha256=None))
        return [info(tensor, tensor.zeros(), stored_bytes=tensor.nbytes) for tensor in tensors]

    return rewrite(checkpoint, dst, plain_file_name, write)
