"""What each block of a chain is called with: found by a forward in which the blocks are passed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from secateur.calibration.block_chains import Chain, ChainBlock, Mark, mark
from secateur.errors import InputError
from secateur.support.inputs import Arguments


class Link(NamedTuple):
    """An argument that an earlier block of the chain gives.

    Attributes:
        block: which one, counted from 0.
        leaf: which leaf of its output.
    """

    block: int
    leaf: int

    def __str__(self) -> str:
        return f"{self.block}.{self.leaf}"


class Key(NamedTuple):
    """An argument that no block of the chain gives: the number of a tensor."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


class BlockCall(NamedTuple):
    """The arguments of one call of a block.

    Attributes:
        spec: the structure of its positional and keyword arguments.
        leaves: in place of each tensor a Link or a Key.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def arguments(self, tensors: Mapping[str, Tensor]) -> Arguments:
        """The arguments, with these tensors in the places of links (as `str` writes them) and keys."""
        leaves = [tensors[str(leaf)] if isinstance(leaf, Link | Key) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    @property
    def links(self) -> list[Link]:
        """What earlier blocks give."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Link)]


class Recorded(NamedTuple):
    """What one batch calls the blocks of a chain with.

    Attributes:
        calls: one for each block.
        tensors: what the blocks do not give, each tensor once.
    """

    calls: tuple[BlockCall, ...]
    tensors: dict[str, Tensor]

    def marks(self, at: int) -> tuple[Mark | None, ...]:
        """The marks of the tensors that a block is called with, None for what blocks give: as `ChainBlock.taken`."""
        leaves = (leaf for leaf in self.calls[at].leaves if isinstance(leaf, Link | Key))
        return tuple(None if isinstance(leaf, Link) else mark(self.tensors[str(leaf)]) for leaf in leaves)


class _StopError(BaseException):
    """The forward came to where it was to stop; no `except Exception` of a model holds that up."""


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else; the modules and their hooks stay what they are."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            own = vars(module)
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.__delitem__, "forward")
            own["forward"] = forward
        yield


@torch.no_grad()
def run_until(model: nn.Module, batch: Arguments, stop: nn.Module | None) -> None:
    """Run a model up to the call of a module; to its end if there is none."""

    def halt(*_: Any, **__: Any) -> None:
        raise _StopError

    with standing_in({} if stop is None else {stop: halt}):
        try:
            model(*batch[0], **batch[1])
        except _StopError:
            return


@torch.no_grad()
def record(model: nn.Module, batch: Arguments, chain: Chain) -> Recorded:
    """Find what the blocks are called with, in a forward in which each gives its input on; it ends at the last one.

    Args:
        model: in eval mode; what stands before the chain runs as it is.
        batch: the arguments of the forward.
        chain: from `course`.

    Raises:
        InputError: the forward goes another way than the one in which the chain was found.
    """
    recorder = _Recorder(chain)
    try:
        with standing_in({block.module: recorder.forward(at) for at, block in enumerate(chain)}):
            model(*batch[0], **batch[1])
    except _StopError:
        return Recorded(tuple(recorder.calls), recorder.tensors)
    raise _other_way(chain[len(recorder.calls)])


def _other_way(block: ChainBlock) -> InputError:
    return InputError(
        f"{block.name} does not run in this batch as in the first one: give batches that all go the same way through "
        "the model, or leave out sequential"
    )


class _Recorder:
    """What stands in for the blocks of a chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.calls: list[BlockCall] = []
        self.tensors: dict[str, Tensor] = {}
        self._links: list[tuple[Tensor, Link]] = []  # what was given in place of outputs

    def forward(self, at: int) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if at != len(self.calls):
                raise _other_way(self.chain[at])
            leaves, spec = tree_flatten((args, kwargs))
            self.calls.append(BlockCall(spec, tuple(map(self._told, leaves))))
            if at + 1 == len(self.chain):
                raise _StopError
            return self._output(at, leaves)

        return stand_in

    def _told(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for given, link in self._links:
            if given is leaf:
                return link
        for number, held in enumerate(self.tensors.values()):
            if held is leaf:
                return Key(number)
        key = Key(len(self.tensors))
        self.tensors[str(key)] = leaf
        return key

    def _output(self, at: int, taken: list[Any]) -> Any:
        """A structure as that of the block's output: first the state that it took, then empty tensors."""
        block = self.chain[at]
        before = [given for given, link in self._links if link.block == at - 1][:1]
        state = next((leaf for leaf in taken if isinstance(leaf, Tensor) and (not at or leaf is before[0])), None)
        if state is None:
            raise _other_way(block)
        leaves = []
        for place, leaf in enumerate(block.leaves):
            if isinstance(leaf, Mark):
                first = not any(link.block == at for _, link in self._links)
                leaf = state.detach() if first else state.new_empty(0)
                self._links.append((leaf, Link(at, place)))
            leaves.append(leaf)
        return tree_unflatten(leaves, block.spec)
