"""How true a changed model is to itself: its outputs for the same inputs beside those of before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration.observation import undisturbed
from secateur.calibration.padding import kept, real_positions, told
from secateur.errors import InputError, NotFiniteError, SecateurError
from secateur.support.inputs import arguments

_MOST = 1 << 24
"""Numbers of an output that are held, 64 MB: of the logits of a language model, vectors at even steps tell as much."""


class Fidelity:
    """The outputs of a model as it is now; `of(model)` is the mean cosine between them and those of a changed model.

    A vector is what the last dimension of an output holds, for each sample and position; of an output [samples], or
    of a last dimension of one number, all samples are one vector. Positions that a mask among the inputs says are
    padding do not count, nor those of which the attention of torch is told inside, nor numbers that are NaN or inf
    before the change, such as logits that are masked. All outputs of floating-point numbers count alike, such as
    logits and hidden states.

    Args:
        model: run in eval mode, without gradients; its mode, buffers and torch's random numbers are as before then.
        batches: what it is called with: a tensor, a tuple of positional or a dict of keyword arguments each.

    Raises:
        InputError: no batch, one that the model does not take, or outputs without floating-point numbers.
        NotFiniteError: outputs of nothing but NaN and inf.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._batches = list(batches)
        try:
            self._dense = list(_outputs(model, self._batches))
        except SecateurError:
            raise
        except Exception as error:
            raise InputError(
                f"the model does not take the batches to check on ({type(error).__name__}: {error}): let it have the "
                "dtype and the device of those that sc.calibrate was given, or calibrate again"
            ) from error
        if not any(self._dense):
            raise InputError(
                "the outputs of the model hold no floating-point numbers to compare: give evaluate=, a function "
                "(model) -> float, higher is better"
            )
        if not any(bool(one.isfinite().any()) for outputs in self._dense for one in outputs):
            raise NotFiniteError(
                "the outputs of the model on the batches to check on hold nothing but NaN and inf: look for them in "
                "every fifth batch, or in a weight"
            )

    def of(self, model: nn.Module) -> float:
        """The mean cosine: 1 for equal outputs, 0 for unrelated ones; -1 if one is not finite."""
        total, count = 0.0, 0
        for dense, outputs in zip(self._dense, _outputs(model, self._batches), strict=True):
            for before, now in zip(dense, outputs, strict=True):
                usable = before.isfinite()
                if not bool(usable.all()):
                    some = usable.any(-1)
                    before, now, usable = before[some], now[some], usable[some]
                    before, now = before.where(usable, 0.0), now.where(usable, 0.0)
                cosines = torch.cosine_similarity(before.double(), now.double(), dim=-1)
                cosines = cosines.where((before != now).any(-1), 1.0)  # also where both are zero
                total += float(cosines.nan_to_num(-1.0).sum()) if bool(now.isfinite().all()) else -float(len(cosines))
                count += len(cosines)
        return total / count


def _outputs(model: nn.Module, batches: Sequence[Any]) -> Iterator[list[Tensor]]:
    """The outputs for each batch, each as vectors [n, numbers]."""
    with undisturbed(model):
        for batch in batches:
            call = arguments(batch)
            with told(model) as inside:
                out = model(*call[0], **call[1])
            yield _vectors(out, [*real_positions(model, call), *inside.values()])


def _vectors(out: Any, masks: Sequence[Tensor]) -> list[Tensor]:
    found = []
    for leaf in tree_leaves(dict(out) if isinstance(out, Mapping) else out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            rows = leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim > 1 and leaf.shape[-1] > 1 else leaf.reshape(1, -1)
            real = kept(masks, leaf.shape[:-1]) if leaf.ndim > 2 else None
            rows = rows if real is None else rows[real.to(rows.device)]
            step = -(-rows.numel() // _MOST)
            found.append(rows[::step].clone() if step > 1 else rows)  # the whole is not held any longer
    return found
