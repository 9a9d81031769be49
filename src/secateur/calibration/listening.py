"""What the weights of a model read in its forward, seen at the functions of torch that they are given to.

Which operand of which function may be a weight, and which of the other operand it reads, stands in `products`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur import anatomy
from secateur.calibration import padding, recurrent
from secateur.calibration.grams import Grams, Reader, ordered
from secateur.calibration.moments import Moments
from secateur.calibration.patches import Geometry, patches
from secateur.calibration.reading import Weights
from secateur.calibration.recurrent import Run
from secateur.scope import Member

Handle = Callable[..., None]
_HANDLED: dict[str, tuple[Handle, inspect.Signature]] = {}
Replacement = Callable[..., Any]
_REPLACED: dict[str, Replacement] = {}


class _Told(NamedTuple):
    """Which positions are real: [examples, positions], as attention has them inside, and as the model has them."""

    inside: Tensor
    outside: Tensor


class Listener(TorchFunctionMode):
    """Sums what weights read while a model runs under it.

    Args:
        members: the weights, by name.
        model: whose attention may be told what is padding; by default that whose weights are among the members.

    Attributes:
        runs: the calls of recurrent modules, by their names: what these read is told from the whole sequences.
    """

    def __init__(self, members: Mapping[str, Member], model: nn.Module | None = None) -> None:
        super().__init__()
        self.weights = Weights(members)
        self.grams = Grams()
        self.runs: dict[str, list[Run]] = {}
        self._recurrent = {
            member.module: name.rpartition(".")[0]
            for name, member in members.items()
            if isinstance(member.module, nn.RNNBase | nn.RNNCellBase) and anatomy.rank(member.attribute) is not None
        }
        modules = {member.module for member in members.values()} if model is None else model.modules()
        self._turned = {
            id(weight)
            for module in modules
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first
            for weight in module.parameters(recurse=False)
        }
        self._of_batch: Sequence[Tensor] = ()
        self._told: dict[padding.Shape, _Told] = {}
        self._time_first = False
        self._gathered: dict[int, tuple[weakref.ref[Tensor], Tensor, Tensor]] = {}

    @contextmanager
    def forward(self, masks: Sequence[Tensor] = ()) -> Iterator[None]:
        """Listen to one forward.

        Args:
            masks: of its batch, from `padding.real_positions`: samples that are padding are left out. So are those
                of which an attention of torch is told on the way.
        """
        self._of_batch = masks
        self._told.clear()
        hooks = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self._recurrent]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._gathered.clear()
        self.grams.flush()

    @contextmanager
    def time_first(self) -> Iterator[None]:
        """Take samples for [positions, examples] meanwhile, as attention of torch.nn has them inside."""
        self._time_first = True
        try:
            yield
        finally:
            self._time_first = False

    def tell(self, weight: object, x: Tensor, masks: Sequence[Tensor]) -> None:
        """Leave out the padding of which an attention is told, in what is read from now on and has its positions.

        Args:
            weight: of its first projection.
            x: what it reads, [positions, examples, inputs] or [positions, inputs].
            masks: from `padding.real_keys`.
        """
        shape = (x.shape[1] if x.ndim > 2 else 1, x.shape[0])
        before = self._told.pop(shape, None)
        for real in masks:
            if before is not None and torch.equal(before.inside, real):  # the very same one, as sums go by it
                self._told[shape] = before
            else:
                turned = id(weight) in self._turned
                self._told[shape] = _Told(real, real.T.contiguous() if turned else real)

    def _masks(self) -> list[Tensor]:
        """Those that attention was told of, in place of others of that shape, and those of the batch."""
        found = [one.inside if self._time_first else one.outside for one in self._told.values()]
        return [*found, *(mask for mask in self._of_batch if tuple(mask.shape) not in self._told)]

    def moments(self) -> list[Moments]:
        """What was summed over all forwards, in the order of the weights and their rows."""
        found = self.grams.moments(self.weights.matrices)
        for module, prefix in self._recurrent.items():
            if prefix in self.runs and isinstance(module, nn.RNNBase):
                found += recurrent.moments(module, prefix, self.runs[prefix])
        return ordered(found, self.weights.matrices)

    @torch.no_grad()
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of a recurrent module or a cell; what is computed here itself is not to be heard."""
        with torch._C.DisableTorchFunction():
            if isinstance(module, nn.RNNBase):
                self._run(module, args, kwargs)
            elif isinstance(module, nn.RNNCellBase):
                self._cell(module, args, kwargs)

    def _run(self, module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = recurrent.run(module, args, kwargs)
        with self.time_first():
            masks = self._masks()
        for mask in masks:
            ends = mask.sum(1).to(run.lengths)
            behind = mask.shape == run.input.shape[1::-1] and not (mask[:, 1:] & ~mask[:, :-1]).any()
            if behind and int(ends.min()) > 0:  # padding that the module reads, after all that counts
                run = replace(run, lengths=run.lengths.minimum(ends))
        self.runs.setdefault(self._recurrent[module], []).append(run)

    def _cell(self, module: nn.RNNCellBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x, state = given["input"], given.get("hx")
        x = x.detach().float().reshape(-1, x.shape[-1])
        h = state[0] if isinstance(state, tuple | list) else state
        h = x.new_zeros(len(x), module.hidden_size) if h is None else h.detach().float().reshape(len(x), -1)
        direction = recurrent.cell(module, self._recurrent[module])
        direction.add(self.grams, direction.read(x, h))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in _REPLACED:
            return _REPLACED[name](self, func, args, kwargs or {})
        if name in _HANDLED:
            self._hear(*_HANDLED[name], args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if name == "getitem" and self.weights.has(args[0]):
            self._remember(out, *args)
        return out

    def _hear(self, handle: Handle, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        try:
            call = signature.bind(self, *args, **kwargs)
        except TypeError:  # another function of that name
            return
        with torch.no_grad():
            handle(*call.args, **call.kwargs)

    def _remember(self, out: Tensor, weight: Tensor, index: object) -> None:
        """Note a copy of the matrices of some experts, one for each token."""
        if isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64):
            self._gathered[id(out)] = weakref.ref(out), weight, index

    def product(
        self,
        weight: object,
        letters: str,
        x: object,
        x_letters: str,
        order: Sequence[int] = (),
        masks: Sequence[Tensor] = (),
    ) -> None:
        """Add what a weight reads in a product; nothing if it is none of the weights.

        Args:
            weight: the operand that may be one.
            letters: of its dimensions, see `Weights.held`.
            x: the other operand.
            x_letters: of its dimensions; "s" are samples.
            order: for each dimension of the weight, that of x which goes along it, where it has more than one input.
            masks: which samples of x are no padding, if that is known better than from the forward.
        """
        if not isinstance(x, Tensor):
            return
        self._gathered_product(weight, letters, x, x_letters)
        held = self.weights.held(weight, letters)
        if held is None:
            return
        if held.groups == 1:  # one matrix for all: what stands side by side are samples
            x_letters = x_letters.replace("g", "s")
        groups = [d for d, letter in enumerate(x_letters) if letter == "g"]
        samples = [d for d, letter in enumerate(x_letters) if letter == "s"]
        inputs = [d for d, letter in enumerate(x_letters) if letter == "i"]
        if order:
            inputs.sort(key=[order[d] for d in held.inputs].index)
        masks = [] if groups else list(masks) or self._masks()
        real = padding.kept(masks, [x.shape[d] for d in samples], self._time_first)
        how = (x_letters, self._time_first, None if real is None else tuple(map(id, masks)))

        def rows() -> Iterator[Tensor]:
            count = held.groups if groups else 1
            flat = x.detach().permute(*groups, *samples, *inputs)
            flat = flat.reshape(count, -1, torch.Size([x.shape[d] for d in inputs]).numel())
            yield flat if real is None else flat[:, real]

        parts = held.groups if not groups else 1  # one input for all of several matrices: each reads it
        height = (held.stop - held.start) // parts
        for part in range(parts):
            start = held.start + part * height
            self.grams.add(Reader((held.name,), start, start + height), x, how, rows)

    def _gathered_product(self, weight: object, letters: str, x: Tensor, x_letters: str) -> None:
        """Add what experts read of which a copy was made for each token: the tokens of each expert together."""
        whose, experts, index = self._gathered.get(id(weight), (None, None, None))
        if whose is None or experts is None or index is None or whose() is not weight or "g" not in x_letters:
            return
        at = x_letters.index("g")
        for expert in sorted(set(index.tolist())):
            tokens = x.index_select(at, (index == expert).nonzero().flatten())
            self.product(experts[expert], letters.replace("g", ""), tokens, x_letters.replace("g", "s"))

    def convolution(self, weight: object, x: Tensor, geometry: Callable[[tuple[int, ...]], Geometry]) -> None:
        """Add what the kernel of a convolution reads."""
        held = self.weights.kernel(weight)
        if held is not None and isinstance(weight, Tensor):
            made = geometry(tuple(weight.shape[2:]))
            reader = Reader((held.name,), held.start, held.stop)
            self.grams.add(reader, x, made, lambda: patches(x.detach(), made))


def handles(*names: str) -> Callable[[Handle], Handle]:
    """Let a function see the calls of some functions of torch, by plain name: its arguments are named as theirs."""

    def register(handle: Handle) -> Handle:
        _HANDLED.update(dict.fromkeys(names, (handle, inspect.signature(handle))))
        return handle

    return register


def replaces(name: str) -> Callable[[Replacement], Replacement]:
    """Let a function (listener, func, args, kwargs) make the calls of a function of torch in its place."""

    def register(made: Replacement) -> Replacement:
        _REPLACED[name] = made
        return made

    return register
