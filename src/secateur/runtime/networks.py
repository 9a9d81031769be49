"""Networks of sparse convolutions in a module's forward: one native call for each region of it.

Between its steps images stay as the kernels want them. Whatever is not plain inference, and whatever differs from what
was traced, goes through the module's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils._pytree import tree_flatten

from secateur.runtime import products
from secateur.runtime.attributes import NETWORK, packed
from secateur.runtime.graphs import agree, trace
from secateur.runtime.programs import Bound, Program
from secateur.runtime.regions import regions
from secateur.runtime.swapping import Swapped, as_usual, special, swap, swapped_class
from secateur.runtime.traced import Traced, disturbed_inside, is_usual

__all__: list[str] = []  # reached through secateur.accelerate alone


def capture(module: nn.Module) -> Program | None:
    """The program of a module's forward as it is now; None if it cannot be traced, or has no region."""
    if disturbed_inside(module):
        return None
    try:
        graph = trace(module)
    except ValueError:  # more attributes than can be watched
        return None
    if graph is None:
        return None
    found = [*regions(graph, module)]
    return Program(module, graph, found) if found else None


class Network(Traced[str, Program]):
    """What a module keeps: for which row classes its program runs, and what that does, in words.

    A copy makes its own program, and uses it if the words are the same.
    """

    def __init__(self, words: str, choices: int) -> None:
        super().__init__(words)
        self.choices, self.agrees = choices, True

    def __reduce__(self) -> Any:
        return Network, (self.words, self.choices)

    def look(self, module: nn.Module) -> tuple[str, Program] | None:
        made = capture(module)
        return None if made is None else (made.words, made)

    def noted(self, found: Program | None) -> None:
        if found is not None:
            found.release()


class SparseNetwork(Swapped):
    """A module of any class whose forward has regions that are one call each."""

    has_code: ClassVar[bool] = False
    """Its code is that of its layers, which was chosen before."""
    _secateur_network = Network("", 0)  # of a slice of a Sequential, which is made of the same class

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind: Any = cls.plain

        @functools.wraps(kind.forward)
        def forward(self: SparseNetwork, *args: Any, **kwargs: Any) -> Any:
            if is_usual(args, kwargs) and args[0].dim() == 4 and (found := self._ready(args[0])) is not None:
                program, bound = found
                return program.run(args[0], bound)
            return kind.forward(self, *args, **kwargs)  # which may be another by now

        cls.forward = forward

    def choose(self, choices: int, generated: int = 0) -> None:
        """Run regions as one call each for these row classes."""
        self._secateur_network.choices = choices

    @property
    def agrees(self) -> bool:
        """Whether both ways gave the same for all examples."""
        return self._secateur_network.agrees

    def rows(self, *args: Any, **kwargs: Any) -> int:
        """Places of the images that are given."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        return x.shape[0] * x.shape[2] * x.shape[3] if isinstance(x, Tensor) and x.dim() == 4 else 1

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """See whether both ways give the same for an example."""
        network = self._secateur_network
        chosen = network.choices
        outs: list[Any] = []
        try:
            for network.choices in (0, products.ALL):
                fresh = [one.clone() if isinstance(one, Tensor) else one for one in args]
                outs.append(tree_flatten(type(self).forward(self, *fresh, **kwargs)))
        except Exception:  # what stands in for values may go where no value would
            outs = [([None], None), ([], None)]
        finally:
            network.choices = chosen
        (plain, form), (found, found_form) = outs
        same = form == found_form and len(plain) == len(found) and all(map(agree, plain, found))
        network.agrees = network.agrees and same

    def restore(self) -> None:
        """Become the plain module again."""
        self.__dict__.pop(NETWORK, None)
        super().restore()

    def _ready(self, x: Tensor) -> tuple[Program, Bound] | None:
        """What is to run; None if it is the plain forward. Raises a StateError as the layers' own `_ready` does."""
        network = self._secateur_network
        if special() or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return None
        if not network.choices >> products.bucket(self.rows(x)) & 1:
            return None
        program = network.found(self)
        if program is None or not program.layers[0]._takes_input(x):
            return None
        bound = program.bound()
        return None if bound is None or bound.differentiable() else (program, bound)


def install(module: nn.Module, words: str, choices: int) -> SparseNetwork:
    """Turn a module into one whose program runs for these row classes; `restore` turns it back."""
    swap(module, SparseNetwork)
    assert isinstance(module, SparseNetwork)
    module._secateur_network = Network(words, choices)
    return module


def networks(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Program]]]:
    """The modules, by name, whose forward has regions: the outermost ones."""
    seen: set[int] = set()

    def within(name: str, module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Program]]]:
        seen.add(id(module))
        if sum(map(packed, module.modules())) < 2:
            return
        if _swappable(module) and (found := _twice(module)) is not None:
            yield name, (module, found)
            return
        for key, child in module.named_children():
            if id(child) not in seen:
                yield from within(f"{name}.{key}".lstrip("."), child)

    return within("", model)


def _twice(module: nn.Module) -> Program | None:
    """The program of a module, if a second trace gives the same: if it depends on nothing that changes by itself."""
    first, second = capture(module), capture(module)
    return first if first is not None and second is not None and first.words == second.words else None


def _swappable(module: nn.Module) -> bool:
    """Whether a module may get another class, and copies of it come out as such."""
    kind = type(module)
    if isinstance(module, Swapped) or not as_usual(kind):
        return False
    try:
        module.__class__ = swapped_class(SparseNetwork, kind)
    except TypeError:  # with slots, or made by a class of its own
        return False
    finally:
        module.__class__ = kind
    return True
