"""Going back to earlier weights under the masks of now: lottery tickets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur import optimizers as following
from secateur.errors import InputError, MaskError, StateError, UnknownNameError, listed
from secateur.masks import as_masks
from secateur.scope import unwrap
from secateur.support import bits, checks


def rewind(
    model: nn.Module,
    state: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    *,
    optimizer: Any = None,
    optimizer_state: Mapping[str, Any] | None = None,
) -> None:
    """Give a model the weights and buffers of an earlier step, with zeros where the masks of now prune.

    Both states must be copies: `copy.deepcopy([model.state_dict(), optimizer.state_dict()])`. They stay as they are,
    for the next round. Source: Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis".

    Args:
        model: its weights and buffers become those of `state`; all else stays.
        state: `model.state_dict()` of an early step, or of the beginning.
        masks: which weights are kept, by name.
        optimizer: goes back as well, with zeros in what it remembers of pruned weights; or what holds one in
            `.optimizer`. None: make a new one.
        optimizer_state: `optimizer.state_dict()` of the same step.

    Raises:
        InputTypeError: an argument of another type.
        InputError: one of `optimizer` and `optimizer_state` without the other; a state of another model or optimizer;
            a state that is no copy.
        UnknownNameError, MaskError: masks, or a state, of another model.
        StateError: a Pruner that follows the optimizer keeps dense weights beside the model (`sc.feedback`): those of
            the early step are not in `state`. In each case nothing was changed.

    >>> model = nn.Linear(4, 2)
    >>> early = copy.deepcopy(model.state_dict())
    >>> with torch.no_grad():  # a training
    ...     _ = model.weight.add_(1)
    >>> masks = {"weight": early["weight"] > 0}
    >>> rewind(model, early, masks)
    >>> torch.equal(model.weight, early["weight"].clamp(min=0))
    True
    """
    plain, masks = unwrap(model), as_masks(masks)
    weights = masks.writable(plain)
    _require_state(plain.state_dict(), state)
    if (optimizer is None) != (optimizer_state is None):
        raise InputError(
            "an optimizer goes back to a state of its own: give both optimizer and optimizer_state, or leave both out "
            "and make a new optimizer"
        )
    _require_all_shown(weights, [None])
    forgetting = []
    if optimizer is not None:
        stepping = following.resolve([optimizer], {})
        _require_all_shown(weights, stepping)
        before = stepping[0].state_dict()
        _require_copy("optimizer_state", optimizer_state, before)
        try:
            stepping[0].load_state_dict(copy.deepcopy(optimizer_state))  # which it would else train on
            forgetting = following.forgetting(stepping, weights, masks, bits.Zeroer())
        except Exception as error:
            stepping[0].load_state_dict(before)
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"optimizer_state is not of this {type(stepping[0]).__name__} ({error}): give what its state_dict() "
                "gave at the early step"
            ) from error
    plain.load_state_dict(state)
    masks.apply(plain)
    for forget in forgetting:
        forget()


def _require_all_shown(weights: Mapping[str, Tensor], optimizers: Sequence[object]) -> None:
    """See that no pruner of these weights that follows one of these optimizers withholds weights of the late step.

    Raises:
        StateError: one does.
    """
    ids = {id(weight) for weight in weights.values()}
    for owner in (owner for one in optimizers for owner in following.owners(one)):
        if owner.withholds and any(id(parameter) in ids for parameter in owner.model.parameters()):
            raise StateError(
                f"{owner!r} keeps the dense weights of now beside the model, and would bring them back among the early "
                "ones: detach() it, and after the rewind hold its masks with sc.Pruner(model, masks)"
            )


def _require_state(now: Mapping[str, Any], state: object) -> None:
    """See that a state is a copy of one of this model.

    Raises:
        InputTypeError: it is none. UnknownNameError, MaskError: of another model. InputError: no copy.
    """
    if not isinstance(state, Mapping):
        raise checks.wrong("state", state, "what model.state_dict() gave at the early step")
    differ = sorted(map(str, set(now) ^ set(state)))
    if differ:
        raise UnknownNameError(
            f"the state is of another model, or not whole: {listed(differ)} is in one of them only; give what "
            "model.state_dict() gave at the early step"
        )
    for name, tensor in now.items():
        if isinstance(tensor, Tensor) and getattr(state[name], "shape", None) != tensor.shape:
            raise MaskError(
                f"the state is of another model: its {name} is not of shape {tuple(tensor.shape)}; give what "
                "model.state_dict() gave at the early step"
            )
    _require_copy("state", state, now)


def _require_copy(what: str, state: object, now: object) -> None:
    """See that a state is not the one that is being trained.

    Raises:
        InputError: it is.
    """
    memory = {tensor.data_ptr() for tensor in _tensors(now) if tensor.numel()}
    if any(tensor.data_ptr() in memory for tensor in _tensors(state) if tensor.numel()):
        raise InputError(
            f"{what} is the state of now, not of an early step, since state_dict() makes no copy: keep "
            "copy.deepcopy(model.state_dict()) at the early step, and that of the optimizer too"
        )


def _tensors(state: object) -> list[Tensor]:
    leaves = tree_leaves(dict(state) if isinstance(state, Mapping) else state)
    return [bits.local(leaf) if bits.is_sharded(leaf) else leaf for leaf in leaves if isinstance(leaf, Tensor)]
