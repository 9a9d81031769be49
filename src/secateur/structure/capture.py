"""One real forward, with labels riding along.

What each function of torch does to labels stands in `rules/`, under `@rule`. Here are the two primitives that rules are
built of (`unite`, `rigid`), what follows from them (`join`, `reduce`, `contract`), and the run itself.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import InputError, StructureError, listed
from secateur.structure.calls import Call, Run, in_place, key, numbers, results, tensors
from secateur.structure.calm import calm
from secateur.structure.constants import constant
from secateur.structure.fields import Labelled, Shape, along, labels, measured, misfit, squeeze, support
from secateur.structure.policy import Policy, relied_on
from secateur.structure.readings import Readings, asked, marked, sizes_of
from secateur.structure.units import Labels, Ledger
from secateur.support.inputs import Arguments
from secateur.support.registry import Registry

Letter = str | int

_PICKED_BY_DATA = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}

_LEAVE = {"numpy", "tolist", "__array", "__dlpack"}
"""With these numbers leave torch, to where no label follows them."""


@dataclass
class Site:
    """One call of a function of torch, as a rule sees it.

    Attributes:
        capture: of the running forward.
        func, args, kwargs, out: the call.
        before: shape and fields of each operand before the call, by id.
    """

    capture: Capture
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: dict[int, Labelled]

    @property
    def name(self) -> str:
        return key(self.func)

    @property
    def operand(self) -> Tensor:
        """The first argument."""
        found: Tensor = self.argument(0, "input")
        return found

    def argument(self, at: int, name: str, default: Any = None) -> Any:
        """An argument by place or by name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def of(self, tensor: Tensor) -> Labelled:
        """Shape and fields of an operand."""
        return self.before[id(tensor)]

    def rigid(self, fields: Sequence[Tensor], dims: Any) -> list[Tensor]:
        """What is left of some fields when positions along dims never go one by one."""
        return [g for f in fields if (g := self.capture.rigid(f, dims)) is not None]


class Rule(NamedTuple):
    """What a function of torch does to labels.

    Attributes:
        apply: the rule.
        always: apply it also where no operand has labels.
        moves: it moves data only: a tensor of any size stays one.
    """

    apply: Callable[[Site], None]
    always: bool = False
    moves: bool = False


RULES: Registry[Rule] = Registry("rule", "")
"""The rule of each function of torch, by the function's plain name."""


def rule(
    names: str, *, always: bool = False, moves: bool = False
) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Let a function be the rule for some functions of torch.

    Args:
        names: plain names of the functions, with spaces between: `add` stands for add, add_, __iadd__, Tensor.add.
        always: see `Rule`.
        moves: see `Rule`.

    Raises:
        InputError: one of them has a rule already.
    """

    def register(apply: Callable[[Site], None]) -> Callable[[Site], None]:
        meaning = (apply.__doc__ or "").partition("\n")[0].rstrip(".")
        one = Rule(apply, always, moves)
        for name in names.split():
            RULES.add(name, one, meaning=meaning)
        return apply

    return register


def table() -> str:
    """The table of the docs: which functions of torch are known, and what they do to labels."""
    rows: dict[str, list[str]] = {}
    for name, choice in RULES.items():
        rows.setdefault(choice.meaning, []).append(f"`{name}`")
    lines = ["| what it does to labels | functions of torch |", "|---|---|"]
    return "\n".join(lines + [f"| {meaning} | {' '.join(sorted(names))} |" for meaning, names in rows.items()])


@dataclass(slots=True)
class _Known:
    """What is known of a tensor.

    Attributes:
        whose: the tensor.
        fields: of it; None if no forward has taken it up.
        elastic: it is zeros(n) or the like: any number of positions without identity.
        loose: it was picked by data, or made of what was.
        given: it is an input of the model, or made of inputs alone.
        made: the call that made it, and which of the results it is.
    """

    whose: weakref.ref[Tensor]
    fields: list[Tensor] | None = None
    elastic: bool = False
    loose: bool = False
    given: bool = False
    made: tuple[Call, int] | None = None


class Capture(TorchFunctionMode):
    """The labels of a model's tensors, and what its forwards do to them.

    Attributes:
        policy: where several answers are right, which is taken.
        ledger: of the labels.
        home: name and tensor of each parameter and buffer that may be cut, by id.
        runs: the forwards seen.
        unseen: names of parameters that no forward reached.
        consulted: names of the parts of the policy that made a difference.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.ledger = Ledger()
        self._readings = Readings(self.ledger)
        self.runs: list[Run] = []
        self.unseen: list[str] = []
        self.consulted: set[str] = set()
        remade = {id(m._buffers[k]) for m in model.modules() for k in m._non_persistent_buffers_set}
        self.home: dict[int, tuple[str, Tensor]] = {}
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not measured(t):
                continue
            computed = id(t) in remade and not constant(t)
            if computed:
                self.consulted.add("cut_remade")
            if policy.cut_remade or not computed:
                self.home.setdefault(id(t), (name, t))
        self._known: dict[int, _Known] = {}  # by id
        self._calls: list[Call] = []
        self._depth = 0
        self._stack: list[str] = [""]
        self._left = False  # whether numbers left torch
        self.now: Call = Call("", "", "")
        self._summed: list[Tensor] = []  # fields over whose labels a sum ran
        self._beside_input = False  # the present call reads floats that are an input, or made of inputs alone

    def _of(self, tensor: Tensor) -> _Known:
        found = self._known.get(id(tensor))
        if found is None or found.whose() is not tensor:  # that of a tensor that is no more
            found = self._known[id(tensor)] = _Known(weakref.ref(tensor))
        return found

    def fields(self, tensor: Tensor) -> list[Tensor]:
        """The fields of a tensor."""
        known = self._of(tensor)
        if known.fields is None:
            known.fields = self.fresh(tensor) if id(tensor) in self.home else []
        return known.fields

    def fresh(self, tensor: Tensor) -> list[Tensor]:
        """New labels for each dimension of a tensor."""
        new = self.ledger.new
        sizes = enumerate(tensor.shape)
        return [along(new(n, tensor.numel() / n), tensor.ndim, d) for d, n in sizes if n > 1]

    def label(self, tensor: Tensor, fields: Sequence[Tensor]) -> None:
        """Give a result its fields."""
        for f in fields:
            if f.ndim != tensor.ndim or any(a not in (1, b) for a, b in zip(f.shape, tensor.shape, strict=True)):
                raise ValueError(f"a field {tuple(f.shape)} for a tensor {tuple(tensor.shape)}")
            if not support(f):  # one unit is all there is: it stays
                self.hold(f)
        self._of(tensor).fields = [f for f in fields if support(f)]

    def same(self, out: Tensor, made: Tensor) -> None:
        """Give the result of a composite the labels of what simpler functions made."""
        self.label(out, [f for own in self.fields(made) if (f := squeeze(own)) is not None])

    def settle(
        self, step: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """A state after so many steps of a recurrence that no further one would tell more: two unite what it unites."""
        counted = len(self.now.products)
        state = step(state)
        del self.now.products[counted:]  # the model makes each step once
        return step(state)

    def seen(self, tensor: Tensor) -> bool:
        """Whether a forward took up a tensor."""
        return self._of(tensor).fields is not None

    def make_elastic(self, tensor: Tensor, elastic: bool = True) -> None:
        """Note that a tensor may have any size, or that it no longer may."""
        self._of(tensor).elastic = elastic

    # ----------------------------------------------------------------------------------------------------- primitives

    def hold(self, f: Tensor, why: str = "") -> bool:
        """Let no unit of a field go."""
        return self.ledger.hold(labels(f), why or str(self.now))

    def hold_unread(self, units: Iterable[tuple[Labels, str]]) -> None:
        """Let none of these go, each with its reason, other than those over which a sum runs."""
        some = [(own, why) for own, why in units if len(own)]
        if some:
            root, _ = self.ledger.solve()
            read = np.zeros(len(root), bool)
            for f in self._summed:
                read[root[labels(f)]] = True
            for own, why in some:
                self.ledger.hold(own[~read[root[own]]], why)

    def balance(self, rows: Tensor) -> None:
        """Let equally many units stay in each row."""
        self.ledger.balance(labels(rows), str(self.now))

    def unite(self, f: Tensor, g: Tensor) -> None:
        """Let units at equal positions stay or go together."""
        a, b = labels(f), labels(g)
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        self.ledger.unite(a, b, str(self.now))

    def rigid(self, f: Tensor, dims: Any, why: str = "") -> Tensor | None:
        """Let positions along dims never go one by one: unite the labels along them.

        Args:
            f: the field.
            dims: of it.
            why: if it is not the present call.

        Returns the field that is left, which varies along the other dimensions only; None if there is none: then all
        of its units are held.
        """
        within = support(f) & set(dims)
        if within and within == support(f):
            self.hold(f, why)
            return None
        for d in within:
            first = f.narrow(d, 0, 1)
            self.unite(first.expand_as(f), f)
            f = first
        return f

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def join(self, operands: Sequence[Labelled]) -> list[Tensor]:
        """Element by element: equal positions are one unit. All shapes have the dimensions of the result."""
        shape, out = operands[0]
        for size, fields in operands[1:]:
            out = self._meet(shape, out, size, fields)
            shape = tuple(max(a, b) for a, b in zip(shape, size, strict=True))
        return out

    def _meet(self, shape: Shape, ours: Sequence[Tensor], size: Shape, theirs: Sequence[Tensor]) -> list[Tensor]:
        left, right = list(ours), list(theirs)
        out: list[Tensor] = []
        while pairs := [
            (misfit(f, g), i, j) for i, f in enumerate(left) for j, g in enumerate(right) if support(f) & support(g)
        ]:
            near = [pair[1:] for pair in pairs if pair[0] == min(pairs)[0]]
            i, j = min(near, key=lambda at: self._finest(left[at[0]], right[at[1]])) if len(near) > 1 else near[0]
            f, g = left.pop(i), right.pop(j)
            if support(f) == support(g):
                self.unite(f, g)
                out.append(f)
            elif support(f) < support(g) or support(g) < support(f):
                small, big, side = (f, g, right) if support(f) < support(g) else (g, f, left)
                if self._rows_go(small, big):
                    self.unite(small, big)
                    out.append(small)
                else:
                    self.rigid(small, support(small))
                    side += [h] if (h := self.rigid(big, support(small))) is not None else []
            else:  # [h, d] and [h, e]: what they share goes whole, or stays whole
                both, whole = support(f) & support(g), self.policy.whole_heads
                self.consulted.add("whole_heads")
                rest = [self.rigid(h, support(h) - both if whole else both) for h in (f, g)]
                if whole and rest[0] is not None and rest[1] is not None:
                    self.unite(rest[0], rest[1])
                    out.append(rest[0])
                else:
                    left += [h for h in rest[:1] if h is not None]
                    right += [h for h in rest[1:] if h is not None]
        why = f"an input of the model, read by {self.now}" if self._beside_input else ""
        for mine, other in ((left, size), (right, shape)):
            for f in mine:  # without a partner: where the other operand is as large, nothing can go
                h = self.rigid(f, {d for d in support(f) if other[d] > 1}, why)
                out += [h] if h is not None else []
        return out

    def _finest(self, *fields: Tensor) -> float:
        """The numbers that one unit of these carries: few where there are many units."""
        return sum(self.ledger.mass(labels(f)) for f in fields)

    def _rows_go(self, small: Tensor, big: Tensor) -> bool:
        """Where [h] meets [h, d]: whether whole rows go, as `small` asks, or h stays whole so that d can go instead.

        The latter where `small` is a trifle beside `big` (a scale per head) and d is the finer of the two.
        """
        rest = big
        for d in support(small):
            rest = rest.narrow(d, 0, 1)
        if self.policy.whole_heads or _distinct(small) >= _distinct(rest):
            return True
        return 4 * self.ledger.mass(labels(small)) >= self.ledger.mass(labels(big))

    def reduce(self, fields: Sequence[Tensor], dims: Any) -> list[Tensor]:
        """Sum over dims: labels that vary along them end here, and may not differ along the rest."""
        out: list[Tensor] = []
        for f in fields:
            if not support(f) & set(dims):
                out.append(f)
                continue
            self._summed.append(f)
            if self.policy.whole_heads and support(f) - set(dims):
                self.consulted.add("whole_heads")
                left = self.rigid(f, dims)
                left = None if left is None else squeeze(left)
                out += [left] if left is not None else []
            else:
                self.rigid(f, support(f) - set(dims))
        return out

    def contract(self, operands: Sequence[tuple[Labelled, Sequence[Letter]]], result: Sequence[Letter]) -> list[Tensor]:
        """A product over shared letters, summed over those that are not in the result.

        Args:
            operands: shape and fields of each operand, and a letter for each of its dimensions.
            result: the letters of the result; one that no operand has is a new dimension of size 1.
        """
        space = sorted({c for _, letters in operands for c in letters}, key=str)
        at = {c: i for i, c in enumerate(space)}
        spread: list[Labelled] = []
        for (shape, fields), letters in operands:
            order = sorted(range(len(letters)), key=lambda d: at[letters[d]])
            turned = order != [*range(len(letters))]

            def wide(sizes: Sequence[int], letters: Sequence[Letter] = letters) -> Shape:
                full = [1] * len(space)
                for d, c in enumerate(letters):
                    full[at[c]] = sizes[d]
                return tuple(full)

            spread.append((wide(shape), [(f.permute(order) if turned else f).reshape(wide(f.shape)) for f in fields]))
        joint = self.join(spread)
        self.now.products.append((tuple(map(max, zip(*(sizes for sizes, _ in spread), strict=True))), joint))
        kept = self.reduce(joint, [at[c] for c in space if c not in result])
        back = [at[c] for c in result if c in at]
        out: list[Tensor] = []
        for f in kept:
            g = f.permute(back + [i for i in range(len(space)) if i not in back])
            g = g.reshape(g.shape[: len(back)])
            for i, c in enumerate(result):
                g = g if c in at else g.unsqueeze(i)
            out.append(g)
        return out

    # -------------------------------------------------------------------------------------------------------- the mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), key(func)
        if name in ("get.shape", "size") and self._depth == 0:
            return self._read(func(*args, **kwargs), *args, **kwargs)
        known = RULES.get(name.removeprefix("get."))
        if name.startswith(("get.", "__len")) and known is None:
            return func(*args, **kwargs)
        operands = tensors((args, kwargs))
        before = {id(t): (tuple(t.shape), self.fields(t)) for t in operands}
        out = func(*args, **kwargs)
        outs = results(name, args, out)
        if not outs:
            if name in _LEAVE:
                self._left = True
                self._hold_all(before, f"an array or a list of Python, made by {name} ({_line()})")
            return out
        outer = self.now
        if self._depth == 0:
            own = {id(t): t for t in operands}
            self.now = Call(name, self._stack[-1], _line(), ins=list(before.values()))
            self.now.numbers = numbers([args, kwargs])
            self.now.sources = [self._taken(t) for t in own.values()]
            self._beside_input = any(self._of(t).given for t in operands if measured(t))
        live = any(fields for _, fields in before.values())
        if known is not None and (live or known.value.always):
            self._apply(known.value, Site(self, func, args, kwargs, out, before), operands, outs)
        elif live:
            self._hold_all(before, f"unknown function {self.now}")
        made = [self._of(t) for t in outs]
        for one in made:
            one.fields = one.fields or []
        if self._depth == 0:
            self.now.elastic = any(one.elastic for one in made) or not any(t.numel() for t in outs)
            picked = name == "__getitem" and any(t.dtype == torch.bool for t in operands[1:])
            picked = picked or name in _PICKED_BY_DATA or any(self._of(t).loose for t in operands)
            self.now.loose = picked or not any(map(measured, outs))  # integers have no labels
            self.now.outs = [(tuple(t.shape), self.fields(t)) for t in outs]
            for t, dim, reading in () if self.now.elastic else asked(name, args, kwargs, outs):
                self._readings.met(tuple(t.shape), self.fields(t), dim, reading, str(self.now))
            for i, one in enumerate(made):
                one.given = self._beside_input and not live
                one.made = self.now, i
                one.loose |= picked
            self._calls.append(self.now)
            self.now = outer
        return out

    def _taken(self, t: Tensor) -> Call | str | None:
        """Where an operand comes from; its call is noted to be of use."""
        made = self._of(t).made
        if made is None:
            return self.home[id(t)][0] if id(t) in self.home else None
        made[0].used.add(made[1])
        return made[0]

    def _read(self, out: Any, tensor: Tensor, dim: int | None = None) -> Any:
        """A shape, or one size of it, that remembers where it was read."""
        if not self.seen(tensor):  # to be asked for its shape is not to take part
            return out
        sizes = sizes_of(tuple(tensor.shape), self.fields(tensor))
        return sizes if dim is None or isinstance(out, torch.Size) else sizes[dim]

    def _apply(self, known: Rule, site: Site, operands: list[Tensor], outs: list[Tensor]) -> None:
        elastic = [t for t in operands if self._of(t).elastic]
        moved = known.moves or len(elastic) == len(operands)
        if elastic and not moved:
            site.before = {**site.before, **{id(t): ((1,) * t.ndim, []) for t in elastic}}
            for t in outs:  # what is added in place is real
                self.make_elastic(t, False)
        if elastic and moved and all(self._of(t).elastic for t in operands if measured(t)):
            for t in outs:
                self.make_elastic(t)
        try:
            known.apply(site)
        except Exception as error:  # a rule that does not fit this call: nothing that it touches may go
            self._hold_all(site.before, f"{self.now}: its rule does not fit ({type(error).__name__}: {error})")
            for t in outs:
                self._of(t).fields = []

    def _hold_all(self, before: Mapping[int, Labelled], why: str) -> None:
        for _, fields in before.values():
            for f in fields:
                self.hold(f, why)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run a composite written in simpler functions: its calls label, but are not recorded."""
        self._depth += 1
        try:
            with self:
                yield
        finally:
            self._depth -= 1

    def forward(self, model: nn.Module, arguments: Arguments, training: bool) -> None:
        """Add one forward of the model."""
        args, kwargs = arguments
        self._calls = []
        for t in tensors(arguments):
            self._of(t).given = True
        with marked(model), _module_stack(model) as self._stack, calm(model, training, self):
            out = model(*args, **kwargs)
        relied = relied_on(out)
        if not relied and not self._left:
            raise StructureError(
                f"no tensor is found in what the model returns, a {type(out).__name__}: let it return a tensor, or "
                "tensors in a tuple, a dict or an object"
            )
        for t in relied:
            self._taken(t)
            for f in self.fields(t):
                self.hold(f, "an output of the model")
        self.runs.append(Run(arguments, training, self._calls))


class _Calls(TorchFunctionMode):
    """Which calls are made, other than those that write into buffers, as counters of batches are."""

    def __init__(self, model: nn.Module, home: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.kinds: list[tuple[Any, ...]] = []
        self._home, self._buffers = home, {id(b) for b in model.buffers()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = key(func), dict(kwargs or {})
        out = func(*args, **kwargs)
        outs = results(name, args, out)
        counts = in_place(func) and all(id(t) in self._buffers for t in outs)
        if outs and not counts and (not name.startswith("get.") or name.removeprefix("get.") in RULES):
            call = Call(name, "", "", [(tuple(t.shape), []) for t in outs], numbers=numbers([args, kwargs]))
            own = {id(t): None for t in tensors((args, kwargs))}
            call.sources = [self._home[i][0] for i in own if i in self._home]
            self.kinds.append(call.kind())
        return out


def _kinds(
    model: nn.Module, arguments: Arguments, training: bool, home: Mapping[int, tuple[str, Tensor]]
) -> list[tuple[Any, ...]] | None:
    """The kinds of the calls that a forward makes; None where it fails."""
    args, kwargs = arguments
    seen = _Calls(model, home)
    try:
        with calm(model, training, seen):
            model(*args, **kwargs)
    except InputError:
        raise
    except Exception:
        return None
    return seen.kinds


def capture(model: nn.Module, examples: Sequence[Arguments], policy: Policy) -> Capture:
    """Run each example once in eval mode; in training mode too if that makes other calls, or a parameter is unreached.

    Caches outside of the model are filled before: later forwards make the calls that are captured.

    Raises:
        StructureError: a parameter was not reached, and the forward in training mode fails.
    """
    home = Capture(model, policy).home
    before = [_kinds(model, arguments, True, home) for arguments in examples]
    cap, called = _evaluated(model, examples, policy)
    if before != called and called != [_kinds(model, arguments, False, home) for arguments in examples]:
        cap, called = _evaluated(model, examples, policy)  # the other filled a cache that training does not use
    for run, now, trained in zip(list(cap.runs), called, before, strict=True):
        if not cap.unseen and trained in (None, now):
            continue
        try:
            cap.forward(model, run.arguments, True)
        except Exception as error:
            if cap.unseen:
                raise StructureError(
                    f"{listed(cap.unseen)} may take part in training only, and the forward in training mode fails "
                    f"({type(error).__name__}: {error}): give inputs with which it runs too, or delete what is not used"
                ) from error
    cap.unseen = [n for n, p in model.named_parameters() if not cap.seen(p)]
    _hold_left_out(cap)
    return cap


def _evaluated(
    model: nn.Module, examples: Sequence[Arguments], policy: Policy
) -> tuple[Capture, list[list[tuple[Any, ...]]]]:
    """The capture of each example in eval mode, and the kinds of its calls."""
    cap = Capture(model, policy)
    for arguments in examples:
        cap.forward(model, arguments, False)
    cap.unseen = [n for n, p in model.named_parameters() if not cap.seen(p)]
    return cap, [[call.kind() for call in run.calls] for run in cap.runs]


def _hold_left_out(cap: Capture) -> None:
    """Hold what slices leave out and nothing else takes, such as the rest of table[:length]: longer inputs may."""
    sliced: dict[Call | str, tuple[list[Labels], list[Labels], str]] = {}  # all labels, those that are taken, by what
    whole: set[Call | str] = set()
    origin: dict[Call, Call | str] = {}  # of what was moved only
    for call in (call for run in cap.runs for call in run.calls):
        known = RULES.get(call.name.removeprefix("get."))
        moves = known is not None and known.value.moves and len(call.sources) == 1
        alike = len({shape for shape, _ in call.outs}) == 1
        parts = call.outs if alike else [one for i, one in enumerate(call.outs) if i in call.used]  # split([n, rest])
        for (shape, fields), source in zip(call.ins, call.sources, strict=True):
            if source is None or not fields:
                continue
            at = origin.get(source, source) if isinstance(source, Call) else source
            if not moves or (alike and len(parts) > 1):
                whole.add(at)
            elif sum(math.prod(size) for size, _ in parts) >= math.prod(shape):
                origin[call] = at
            else:
                every, taken, _ = sliced.setdefault(at, ([], [], str(call)))
                every += [labels(f).ravel() for f in fields]
                taken += [labels(f).ravel() for _, own in parts for f in own]
    cap.hold_unread(
        (np.setdiff1d(np.concatenate(every), np.concatenate([*taken, every[0][:0]])), f"left out by {why}")
        for at, (every, taken, why) in sliced.items()
        if at not in whole
    )


@contextlib.contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The path of the module whose forward is running, as the last item of a list."""
    names = {m: n for n, m in model.named_modules()}
    stack, own = [""], threading.get_ident()  # the hooks are global: other threads may run models too

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == own:
            stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == own:
            stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _line() -> str:
    """File and line of the code that called torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "secateur.structure")):
        frame = frame.f_back
    return f"{_file(frame.f_code.co_filename)}:{frame.f_lineno}"


@functools.lru_cache(4096)
def _file(path: str) -> str:
    return os.path.basename(path)


def _distinct(f: Tensor) -> int:
    return len(np.unique(labels(f)))
