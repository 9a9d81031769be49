"""Units that are dead already: no number of theirs reaches any other unit, or an output.

A second forward, in which beside the labels a flag rides along for each number: whether it depends on an input. What
does not is what the forward computed, whatever the input: the zero of a unit whose weights are masked, for example. A
unit is read where a product of a number of it with another one, neither of them always zero, enters a sum that is of
another unit. What is never read is dead. What a layer with a bias reads of a number that is always the same, the bias
can give. An unknown function lets every result depend on the inputs. Sizes and Python numbers may too, but nothing
tells where they come from: so constants pass only functions that have none, and zeros where they stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.errors import StructureError
from secateur.structure.calls import Run, key, results, tensors
from secateur.structure.capture import RULES, Capture
from secateur.structure.cut import named_tensors
from secateur.structure.groups import Groups
from secateur.structure.policy import Policy
from secateur.structure.rules.arithmetic import pointwise
from secateur.structure.rules.contract import SUMS
from secateur.structure.rules.norms import pool
from secateur.structure.units import Flags, Labels
from secateur.support.inputs import Arguments

_TIMES = frozenset(["mul", "__mul", "__imul", "__rmul", "multiply"])
_MATRICES = frozenset(["matmul", "bmm", "mm", "mv", "dot", "__matmul", "__rmatmul", "__imatmul"])
_CONVOLUTIONS = frozenset(f"conv{way}{k}d" for way in ("", "_transpose") for k in (1, 2, 3))
_WINDOWS = frozenset(f"conv{k}d" for k in (1, 2, 3))
_PRODUCTS = _MATRICES | _CONVOLUTIONS | {"linear", "einsum"}
_ADDS = frozenset(["mean", "sum", "nansum", "amax"])  # of zeros and ones: positive where there is a one
_EACH = frozenset(["batch_norm", "prelu"])  # number by number, where statistics are fixed
_ZEROS = frozenset(["zeros", "new_zeros", "zeros_like"])
_SAME = """view reshape view_as reshape_as flatten unflatten ravel permute transpose t T mT movedim moveaxis swapaxes
swapdims expand expand_as squeeze unsqueeze to float double half bfloat16 type type_as contiguous clone detach data
mean amax embedding batch_norm prelu leaky_relu elu celu hardtanh softplus threshold softshrink hardshrink dropout
dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"""
_KEEP = frozenset(_SAME.split())  # a number that is the same for every input, place and size stays so
_RANDOM = "rand", "normal", "bernoulli", "multinomial", "exponential", "poisson", "uniform"

_OTHERWISE = "the model makes other calls each time: make its forward deterministic in eval mode"

Sides = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Dead(NamedTuple):
    """Units that are dead already.

    Attributes:
        units: for each label, whether its group is dead: taken away, with what is constant of it, changes no output.
        constants: by the names of a weight [outputs, inputs, *kernel] and of the bias beside it, the number that each
            input always has, where it is dead and its number not zero; 0 elsewhere.
    """

    units: Flags
    constants: dict[tuple[str, str], Tensor]

    def shifts(self, model: nn.Module, groups: Groups, kept: Flags) -> dict[str, list[float]]:
        """What is to be added to biases so that the units that go take no constant with them."""
        found: dict[str, list[float]] = {}
        named = named_tensors(model)
        inputs = {axis.name: ~kept[axis.labels] for axis in groups.axes if axis.dim == 1}
        for (name, bias), constant in self.constants.items():
            if name not in inputs:
                continue
            gone = torch.from_numpy(inputs[name]) & (constant != 0)
            if bool(gone.any()):
                weight = named[name].detach().double().cpu()
                whole = weight.flatten(2).sum(-1) if weight.ndim > 2 else weight
                shift = (whole[:, gone] @ constant[gone]).tolist()
                found |= {alias: shift for alias, t in named.items() if t is named[bias]}
        return found


def dead(model: nn.Module, runs: Sequence[Run], policy: Policy, groups: Groups) -> Dead:
    """Find the units that are dead.

    Args:
        model: as it was captured.
        runs: of the capture, in order.
        policy: of the capture.
        groups: of the capture.

    Raises:
        StructureError: the forwards do not make the same calls again.
    """
    root, held = groups.root, [*groups.held]
    found = np.zeros(len(root), bool)
    while True:  # a unit that is read by dead ones only is dead
        look = _Reads(model, policy, root, found)
        for run in runs:
            look.forward(model, run.arguments, run.training)
        if look.ledger.size != len(root):
            raise StructureError(_OTHERWISE)
        look.read[held] = True  # outputs among them
        now = ~look.read[root]
        if np.array_equal(now, found):
            return Dead(found, look.constants)
        found = now


class _Reads(Capture):
    """A capture that knows the groups, and notes which of them are read.

    Attributes:
        root: the group of each label.
        dead: for each label, whether its group is known to be dead.
        read: the groups that others, which are not known to be dead, read.
        constants: as in `Dead`.
    """

    def __init__(self, model: nn.Module, policy: Policy, root: Labels, dead: Flags) -> None:
        super().__init__(model, policy)
        self.root, self.dead = torch.from_numpy(root), torch.from_numpy(dead)
        self.read = np.zeros(len(root), bool)
        self.read[0] = True
        self.constants: dict[tuple[str, str], Tensor] = {}
        self._fed = WeakTensorKeyDictionary()  # tensor -> which numbers depend on an input; none where it has none
        self._composed = False  # the last call was written in simpler ones
        self._branched = False  # Python looked at a number that depends on an input

    def forward(self, model: nn.Module, arguments: Arguments, training: bool) -> None:
        """Add one forward of the model, of whose arguments every number is an input."""
        for t in tensors(arguments):
            self._fed[t] = _all(t)
        self._branched = False
        super().forward(model, arguments, training)

    # ------------------------------------------------------------------------------------- what depends on an input

    def fed(self, t: Tensor) -> Tensor:
        """Which numbers of a tensor depend on an input."""
        found: Tensor = self._fed[t] if t in self._fed else ~_all(t)
        return found

    def same(self, out: Tensor, made: Tensor) -> None:
        """Label the result of a composite as what its simpler functions made, and flag it likewise."""
        super().same(out, made)
        flags = self.fed(made)
        fits = made.ndim == out.ndim and all(a in (1, b) for a, b in zip(made.shape, out.shape, strict=True))
        self._note(out, flags.expand(out.shape) if fits else flags.any().expand(out.shape))
        self._composed = True

    def settle(
        self, step: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Step until no further unit of a state is seen to depend on inputs, or to change from step to step."""
        before: Sequence[Tensor] = state
        now = step(state)
        while True:
            new = False
            with torch._C.DisableTorchFunction():
                for a, b in zip(before, now, strict=True):
                    old = self._units(self.fed(a))
                    own = old | self._units(self.fed(b) | (a != b))
                    new |= bool((own & ~old).any())
                    self._note(b, own.expand(b.shape))
            if not new:
                return now
            before, now = now, step(now)

    def _units(self, flags: Tensor) -> Tensor:
        return flags.flatten(0, -2).any(0)

    def _note(self, t: Tensor, flags: Tensor, written: bool = True) -> None:
        self._fed[t] = flags
        base = t._base if written else None  # it may have been written through a view
        if base is not None and base is not t and bool(flags.any()) and not bool(self.fed(base).any()):
            self._fed[base] = _all(base)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), key(func)
        operands = tensors((args, kwargs))
        keeps = _keeps(name, args, kwargs) and not self._branched
        careful = name in _PRODUCTS or name in _TIMES or not keeps
        nonzero = {id(t): (t != 0) | self.fed(t) for t in operands} if careful else {}
        before = {id(f): f for t in operands if self.seen(t) for f in self.fields(t)}
        self._branched |= name == "__bool" and bool(self.fed(operands[0]).any())
        self._composed = False
        out = super().__torch_function__(func, types, args, kwargs)
        if name in SUMS:  # seen as a product, and a sum
            x, a, b = operands[:3]
            with self.inside():
                product = torch.matmul(a, b)
                self.same(out, (product.sum(0) if name == "addbmm" else product) + x)
        outs = results(name, args, out)
        if not outs or self._composed or name.startswith("__len"):
            return out
        sides = _sides(name, args, kwargs)
        if sides is not None:
            a, b, *_ = _two(name, args, kwargs)
            constant = self._constant(name, args, kwargs, sides, a, b)
            self._multiplied(sides, (a, nonzero[id(a)]), (b, nonzero[id(b)]), out, constant)
        elif not _moves(name):
            left = [self._groups(f).flatten() for t in outs for f in self.fields(t) if name != "einsum"]
            for f in before.values():
                own = self._groups(f).flatten()
                self._note_read(own[~torch.isin(own, torch.cat(left))] if left else own)
        every = name.startswith(_RANDOM) or not (operands or name in _ZEROS)
        if every or not keeps or any(t in self._fed for t in operands):
            try:
                known = not every and self._flags(name, func, args, kwargs, outs, nonzero, keeps)
                flags = known or [_all(t) for t in outs]
                flags = [f.expand(t.shape) for f, t in zip(flags, outs, strict=True)]
            except Exception:  # a call of another form: everything may depend on the inputs
                flags = [_all(t) for t in outs]
            for t, f in zip(outs, flags, strict=True):
                self._note(t, f if keeps else f | (t != 0), written=not _moves(name))
        return out

    def _flags(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        outs: list[Tensor],
        nonzero: dict[int, Tensor],
        keeps: bool,
    ) -> list[Tensor]:
        """Which numbers of the results depend on an input."""
        operands = tensors((args, kwargs))

        def fed(t: Tensor) -> Tensor:
            return self.fed(t) if keeps else nonzero[id(t)]

        def run(swap: Callable[[Tensor], Any]) -> list[Tensor]:
            def to(t: Any) -> Any:
                return swap(t) if isinstance(t, Tensor) else t

            moved = func(*tree_map(to, args), **{k: 0 if k == "value" else tree_map(to, v) for k, v in kwargs.items()})
            return [m > 0 if m.dtype != torch.bool else m for m in tensors(moved)]

        if name in _PRODUCTS:
            a, b = operands[:2]
            own = {id(a): a, id(b): b}

            def one(which: Tensor) -> Tensor:
                def swap(t: Tensor) -> Any:
                    if id(t) not in own:
                        return None  # a bias
                    flags = fed(t) if t is which else nonzero[id(t)]
                    return flags.to(t.dtype if t.is_floating_point() else torch.float32)

                return run(swap)[0]

            def bias(t: Tensor) -> Tensor:
                return torch.zeros_like(t) if id(t) in own else fed(t).to(t.dtype)

            return [one(a) | one(b) | run(bias)[0]]
        if name in _ZEROS:
            return [~_all(t) for t in outs]
        if name in _TIMES and len(operands) == 2:
            a, b = operands
            return [(fed(a) & nonzero[id(b)]) | (fed(b) & nonzero[id(a)])]
        if name == "__setitem":
            flags = fed(args[0]).clone()
            if any(bool(self.fed(t).any()) for t in tensors(args[1])):
                return [_all(args[0])]
            flags[args[1]] = fed(args[2]) if isinstance(args[2], Tensor) else False
            return [flags]
        if name == "embedding":
            table = next(t for t in operands if t.is_floating_point())
            return [fed(table).any(0) | (table != table[:1]).any(0)]
        if _moves(name) or name in _ADDS or _applies(name, pool):
            first = operands[0]
            index = [t for t in operands if t is not first and not t.is_floating_point()]
            if not any(bool(self.fed(t).any()) for t in index):
                skip = {id(t) for t in index}
                return run(lambda t: t if id(t) in skip else fed(t).float())
        fixed = True not in (*args[5:6], kwargs.get("training")) and not any(
            bool(self.fed(t).any()) for t in operands[1:]
        )
        if name in _EACH and fixed:
            return [fed(operands[0])]
        if _applies(name, pointwise):
            return [_any([fed(t) for t in operands])]
        return [_all(t) for t in outs]

    # ---------------------------------------------------------------------------------------------- who reads whom

    def _constant(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], sides: Sides, x: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Which inputs of a layer are always the same number, so that a bias can take their place."""
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        own = id(weight) in self.home and id(bias) in self.home
        if self._branched or not _plain(name, args, kwargs) or not own or weight.ndim < 2:
            return None
        values, fed = sides[0](x.double()), sides[0](self.fed(x).double())
        if values.ndim > 2 and len(values) > 1:
            return None  # groups
        values, fed = values.reshape(-1, values.shape[-1]), fed.reshape(-1, values.shape[-1])
        always = (values == values[:1]).all(0) & (fed == 0).all(0) & values[0].isfinite()
        now = torch.where(always, values[0], 0.0).cpu()
        pair = self.home[id(weight)][0], self.home[id(bias)][0]
        before = self.constants.setdefault(pair, now)
        if not torch.equal(before, now):  # another call found another number
            self.constants[pair] = now = torch.where(before == now, now, 0.0)
            for f in self.fields(weight):
                places = self._groups(f).expand(weight.shape).transpose(0, 1).flatten(1)
                if bool((places == places[:, :1]).all()):
                    self._note_read(places[(before != now), 0])
        return now != 0

    def _multiplied(
        self, sides: Sides, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, constant: Tensor | None
    ) -> None:
        """Note which groups a product reads: a [..., m, k] and b [..., k, n] give out [..., m, n]."""
        on_a, on_b, on_out = sides
        terms: Tensor | None = None
        own: list[Tensor] = []
        for (t, _), side, dim in ((a, on_a, -2), (b, on_b, -1)):
            for f in self.fields(t):
                r = side(self._groups(f).expand(t.shape))
                if bool((r == r.narrow(dim, 0, 1)).all()):
                    r = r.narrow(dim, 0, 1).squeeze(dim).unsqueeze(-1)  # [..., k, 1]
                elif bool((r == r.narrow(-3 - dim, 0, 1)).all()):
                    continue  # a unit of the result
                else:
                    self._note_read(r)
                    continue
                if bool(self.read[r.numpy()].all()):
                    continue
                if terms is None:
                    some = on_a(a[1].double()).amax(-2).unsqueeze(-1)
                    terms = ((some > 0) & (on_b(b[1].double()) > 0)).cpu()  # [..., k, n], beside labels
                    if constant is not None:
                        terms = terms & ~constant.unsqueeze(-1)
                    for g in self.fields(out):
                        place = on_out(self._groups(g).expand(out.shape))
                        if bool((place == place.narrow(-2, 0, 1)).all()):
                            own.append(place.narrow(-2, 0, 1))  # [..., 1, n]
                outside = terms
                for place in own:
                    outside = outside & (place != r) & ~self.dead[place]
                self._note_read(r.expand(*outside.shape[:-1], 1)[outside.any(-1, keepdim=True)])

    def _groups(self, f: Tensor) -> Tensor:
        """The groups of the labels of a field."""
        places = f.long()
        if int(places.max()) >= len(self.root):
            raise StructureError(_OTHERWISE)
        return self.root[places]

    def _note_read(self, groups: Tensor) -> None:
        self.read[groups.numpy()] = True


def _all(t: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=t.device).expand(t.shape)


def _any(flags: Sequence[Tensor]) -> Tensor:
    found, *rest = flags
    for one in rest:
        found = found | one
    return found


def _applies(name: str, rule: Callable[..., None]) -> bool:
    known = RULES.get(name)
    return known is not None and known.value.apply is rule


def _moves(name: str) -> bool:
    known = RULES.get(name.removeprefix("get."))
    return known is not None and known.value.moves


def _plain(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is a linear layer, or a convolution without a border."""
    padding = args[4] if len(args) > 4 else kwargs.get("padding", 0)
    return name == "linear" or (name in _WINDOWS and padding in (0, (0,), (0, 0), (0, 0, 0), "valid"))


def _keeps(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether what is the same for every input, place and size stays so."""
    if name.removeprefix("get.") in _KEEP or _plain(name, args, kwargs):
        return True
    if _applies(name, pool):
        return "adaptive" in name or "max_pool" in name
    leaves = [*tree_leaves(args), *(v for v in tree_leaves(dict(kwargs)) if not isinstance(v, bool))]
    return _applies(name, pointwise) and all(v is None or isinstance(v, Tensor | str) for v in leaves)


def _two(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found = tensors((args, dict(kwargs)))
    return found[1::-1] if name == "__rmatmul" else found


def _sides(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sides | None:
    """How the operands and the result of a product are laid out as matrices; None of another function."""
    if name not in _PRODUCTS or name == "einsum":
        return None
    a, b, *_ = _two(name, args, kwargs)
    if name == "linear":
        n = b.shape[0] if b.ndim > 1 else 1
        return (
            lambda t: t.reshape(-1, t.shape[-1]),
            lambda t: t.reshape(n, -1).T,
            lambda t: t.reshape(-1, n),
        )
    if name in _MATRICES:
        tall, wide = a.ndim == 1, b.ndim == 1

        def back(t: Tensor) -> Tensor:
            t = t.unsqueeze(-1) if wide else t
            return t.unsqueeze(-2) if tall else t

        return (
            lambda t: t.unsqueeze(0) if tall else t,
            lambda t: t.unsqueeze(-1) if wide else t,
            back,
        )
    k, crossed = int(name[-2]), "transpose" in name
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)

    def rows(t: Tensor) -> Tensor:
        t = t if t.ndim == k + 2 else t.unsqueeze(0)
        return t.reshape(t.shape[0], groups, t.shape[1] // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)

    def kernel(t: Tensor) -> Tensor:
        t = t.reshape(groups, t.shape[0] // groups, t.shape[1], -1).amax(-1)
        return t if crossed else t.transpose(1, 2)

    return rows, kernel, rows
