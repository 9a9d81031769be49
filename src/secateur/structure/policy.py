"""Where several answers are right, which is taken; and what callers rely on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import StructureError
from secateur.support import checks


@dataclass(frozen=True)
class Policy:
    """What may go where several answers are right.

    Attributes:
        whole_heads: where a product sums over the inner of two joint dimensions, the outer goes whole. The size of a
            head is often used as a scale (head_dim ** -0.5), which would change.
        cut_remade: buffers that are not saved may be cut too. A constructor makes them anew, at full size.
        cut_softmax: a softmax over units may run over those that stay.
        fold: a size that is read as a scale may change, and weights are multiplied so that the function does not.
        told: only sizes that the config of a transformers model can tell may change, so that it can be loaded again.
    """

    whole_heads: bool = True
    cut_remade: bool = False
    cut_softmax: bool = False
    fold: bool = False
    told: bool = True

    def like(self, parts: Collection[str]) -> Policy:
        """The policy that answers as this one does in some parts, and as usual in the others."""
        return Policy(**{name: getattr(self, name) for name in parts})


POLICIES = (
    Policy(),
    Policy(cut_remade=True),
    Policy(cut_softmax=True),
    Policy(cut_remade=True, cut_softmax=True),
    Policy(fold=True),
    Policy(fold=True, cut_remade=True, cut_softmax=True),
    Policy(fold=True, whole_heads=False),
    Policy(fold=True, whole_heads=False, cut_remade=True, cut_softmax=True),
    Policy(told=False),
)
"""In the order in which they are tried."""

_INNER = re.compile("hidden_state|attentions|past_key|cache|model_output|pooler")
_CACHE = re.compile("past_key|cache", re.IGNORECASE)

_PLAIN = (Tensor, nn.Module, type, str, bytes)


def relied_on(out: Any) -> list[Tensor]:
    """The tensors of an output that callers rely on, wherever they stand in it: in containers or attributes.

    Beside logits these are not the states that a model carries along, and its cache never is one of them.

    Raises:
        StructureError: a generator is among them, whose tensors are made later.
    """
    found: list[Tensor] = []
    looked: dict[int, Any] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        if isinstance(value, Iterator):
            raise StructureError(
                f"the model returns {checks.kind(value)}, whose tensors are made after its forward: give a list"
            )
        if isinstance(value, _PLAIN) or id(value) in looked or _CACHE.search(type(value).__name__):
            return
        looked[id(value)] = value
        if isinstance(value, Mapping):
            inner = _INNER if any("logits" in str(name) for name in value) else _CACHE
            for name, one in value.items():
                if not inner.search(str(name)):
                    look(one)
        elif isinstance(value, Sequence | Set):
            for one in value:
                look(one)
        else:
            slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
            for name in dict.fromkeys([*getattr(value, "__dict__", ()), *tree_leaves(slots)]):
                look(getattr(value, name, None))

    look(out)
    return found
