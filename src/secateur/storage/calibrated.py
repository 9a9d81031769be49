"""A checkpoint that may be larger than memory, pruned block by block by what its layers read on some data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur import scope as scopes
from secateur.calibration.by_blocks import Task, pruned_by_blocks
from secateur.masks import Masks
from secateur.scope import Scope
from secateur.storage.checkpoints import Shard, opened
from secateur.storage.contents import TensorInfo, info
from secateur.storage.conversion import plain_file_name, rewrite, target_of, write_plain
from secateur.storage.mapped import mapped, names_in
from secateur.storage.stored import InMemory, Stored
from secateur.support import checks
from secateur.support.files import StrPath


def oneshot_checkpoint(
    model: nn.Module,
    src: StrPath,
    dst: StrPath,
    batches: Sequence[Any],
    task: Task,
    *,
    scope: Callable[[nn.Module], Scope] = scopes.weights,
    folder: StrPath | None = None,
) -> Masks:
    """Prune a checkpoint block by block, as `prune_by_blocks` prunes a model; it is never whole in memory.

    The weights are mapped from their files. Memory holds those of one block, what they read, and without `folder` what
    the batches bring to the next block.

    Args:
        model: of the checkpoint, made under `torch.device("meta")`; has no values afterwards either.
        src: a plain `.safetensors` file, a Hugging Face folder or an index of shards.
        dst: a `.safetensors` file, or a folder if `src` is one: written in the same shards, under the same names, with
            what lies beside (configuration, tokenizer), so that `from_pretrained` or `load_file` reads it.
        batches: what the model is called with.
        task: what is asked.
        scope: a function of the model, called when it has its values.
        folder: as for `prune_by_blocks`: a run that was killed goes on there.

    Returns:
        The masks, under the names of the model.

    Raises:
        InputError: a model that has values; a checkpoint that is packed or of another model; and as
            `prune_by_blocks`. WriteError: the system refuses to write. The source is never touched.
    """
    checks.function("scope", scope, "a function of the model, such as lambda model: sc.weights(model, skip='lm_head')")
    checkpoint = opened(src)
    target_of(checkpoint, dst, plain_file_name)  # seen before the weights are read
    with mapped(model, checkpoint) as plain:
        names = names_in(plain, checkpoint)
        chosen = scope(plain)
        with pruned_by_blocks(plain, batches, task, scope=chosen, folder=folder) as (masks, tensors):
            new = {
                names[name]: tensors[member.name]
                for member in chosen.members.values()
                for name in (member.name, *member.aliases)
            }

            def write(path: Path, shard: Shard) -> Sequence[TensorInfo]:
                now = tuple(_now(stored, new) for stored in shard.tensors)
                write_plain(path, replace(shard, tensors=now))
                return [info(tensor, tensor.zeros()) for tensor in now]

            rewrite(checkpoint, dst, plain_file_name, write)
    return masks


def _now(stored: Stored, new: Mapping[str, Tensor]) -> Stored:
    return InMemory(stored.name, new[stored.name]) if stored.name in new else stored
