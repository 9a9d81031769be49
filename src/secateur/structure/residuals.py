"""Residual blocks: modules of a list that add to what they take.

One forward follows what each module of a list makes of its input. A residual block gives it back in the same shape,
with something added: so the model still computes something without it. Two kinds are found: blocks that add by
themselves, and those whose result is added by the code around them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.structure.blocks import LISTS, children
from secateur.structure.calls import key, results, tensors
from secateur.structure.calm import calm
from secateur.structure.capture import RULES
from secateur.structure.cut import named_tensors, twin
from secateur.structure.policy import relied_on
from secateur.structure.rules.arithmetic import like, pointwise
from secateur.structure.rules.norms import batch_norm, group_norm, layer_norm, normalize, prelu
from secateur.support.inputs import Arguments

_ADDS = frozenset(f"{sides}{name}" for name in ("add", "sub") for sides in ("", "__", "__i", "__r"))
"""Plain names of the functions that join a branch with what it starts from."""
_ALONG = {pointwise, like, batch_norm, group_norm, layer_norm, normalize, prelu}
_NO_BLOCK = "it does not add to what it takes, in the same shape"

Place = int | str
"""Which argument of a call: by position or by name."""


@dataclass(frozen=True)
class Form:
    """What a module gives back when it is passed by.

    Attributes:
        place: the argument that it takes.
        adds: whether it adds to that by itself. If not, the code around it does, and zeros are given back.
        rest: None if it gives a tensor; else, for each further entry of the tuple or list that it gives, whether this
            is an argument, and which one, or its value.
        kind: tuple or list.
    """

    place: Place
    adds: bool = True
    rest: tuple[tuple[bool, Any], ...] | None = None
    kind: type = tuple


@dataclass
class Candidate:
    """A module of a list.

    Attributes:
        name: its path.
        forms: how it is passed by: itself, or the modules in it that are called, by path.
        why: why it may not go; empty if it may.
    """

    name: str
    forms: dict[str, Form] = field(default_factory=dict)
    why: str = ""


def candidates(model: nn.Module, examples: Sequence[Arguments]) -> dict[str, list[Candidate]]:
    """The modules of each list that has residual blocks, as the examples use them.

    A list counts if two of its modules are of one class and one of these is a residual block.
    """
    model = twin(model)
    paths = {container: children(model, container) for container in _lists(model)}
    parts = {name: list(_called(model, name)) for names in paths.values() for name in names}
    watched = {part for some in parts.values() for part in some}
    seen = [_Watch(model, watched).forward(arguments) for arguments in examples]
    found: dict[str, list[Candidate]] = {}
    for container, names in paths.items():
        kinds = Counter(type(model.get_submodule(name)) for name in names)
        every = [_candidate(name, parts[name], seen) for name in names]
        chain = isinstance(model.get_submodule(container), nn.Sequential)  # what it gives is taken by the next
        for one in every:
            if not one.why and chain and not _adds(one):
                one.forms, one.why = {}, _NO_BLOCK
            if not one.why and kinds[type(model.get_submodule(one.name))] < 2:
                one.why = "it is the only one of its class"
        if any(not one.why for one in every):
            found[container] = every
    parted = {one.name for every in found.values() for one in every if not one.why and one.name not in one.forms}
    return {path: every for path, every in found.items() if path not in parted}


def innermost(found: Mapping[str, list[Candidate]]) -> dict[str, list[Candidate]]:
    """Of lists within lists the innermost."""
    return {path: every for path, every in found.items() if not any(_within(other, path) for other in found)}


def nested(path: str, found: Iterable[str]) -> bool:
    """Whether a list lies within another one of these."""
    return any(_within(path, other) for other in found)


def _adds(one: Candidate) -> bool:
    return all(form.adds for form in one.forms.values())


def _within(path: str, other: str) -> bool:
    return path != other and f"{path}.".startswith(f"{other}." if other else "")


def _lists(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, LISTS) and len(module._modules) > 1:
            yield path


def _called(model: nn.Module, name: str) -> Iterator[str]:
    """What is called of a module: itself, or the modules of a list."""
    module = model.get_submodule(name)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield from children(model, name)
    elif any(True for _ in module.parameters()):  # without, there is nothing to win
        yield name


def _candidate(name: str, parts: Sequence[str], seen: Sequence[Mapping[str, Form | str]]) -> Candidate:
    one = Candidate(name, why="" if parts else _NO_BLOCK)
    for part in parts:
        forms = [found[part] for found in seen if part in found]
        if not forms or isinstance(forms[0], str) or any(form != forms[0] for form in forms):
            why = next((form for form in forms if isinstance(form, str)), "it is used in several ways")
            one.why = why if forms else "no forward of the examples calls it"
            break
        one.forms[part] = forms[0]
    return one


_SKIP, _BRANCH, _JOINED, _OUT, _AFTER = "skip", "branch", "joined", "out", "after"


class _Watch(TorchFunctionMode):
    """Follows what modules make of their inputs.

    A tensor that is still what a module took, if normed or moved, is its *skip*; what it computed from that is its
    *branch*; where the two are added they are *joined*. A branch that a module gives back is its *out*, which counts
    where it is added to something else than what is made of it, *after*.
    """

    def __init__(self, model: nn.Module, parts: set[str]) -> None:
        super().__init__()
        self.model, self.parts = model, parts
        self.forms: dict[str, Form | str] = {}
        self.own = {id(t) for t in named_tensors(model).values()}
        self.took: dict[str, Place] = {}  # of modules that run now: the argument that they take
        self.marks: MutableMapping[Tensor, dict[str, str]] = WeakTensorKeyDictionary()  # what it is to each module
        self.added: set[str] = set()  # modules whose out was added to something
        self.beside: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()  # modules that gave it

    def forward(self, arguments: Arguments) -> dict[str, Form | str]:
        """Run the model. Returns how each module that was called can be passed by, or why it cannot."""
        handles = []
        for path in self.parts:
            module = self.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(functools.partial(self._leave, path), with_kwargs=True))
        args, kwargs = arguments
        try:
            with calm(self.model, False, self):
                out = self.model(*args, **kwargs)
            self._take(relied_on(out))
        finally:
            for handle in handles:
                handle.remove()
        none = {path for path, form in self.forms.items() if isinstance(form, Form) and not form.adds} - self.added
        return self.forms | dict.fromkeys(none, _NO_BLOCK)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, key(func)
        operands = list({id(t): t for t in tensors((args, kwargs))}.values())
        self._take(operands)
        marks = [self.marks.get(t, {}) for t in operands]
        out = func(*args, **kwargs)
        rule = RULES.get(name.removeprefix("get."))
        along = rule is not None and (rule.value.moves or rule.value.apply in _ALONG)
        new: dict[str, str] = {}
        for module in {module for mark in marks for module in mark}:
            states = {mark.get(module, "") for mark in marks if module in mark}
            if _OUT in states or _AFTER in states:
                known = zip(operands, marks, strict=True)
                beside = [t for t, mark in known if mark.get(module) not in (_OUT, _AFTER) and id(t) not in self.own]
                if name in _ADDS and any(t.shape == out.shape for t in beside):
                    self.added.update({module} if _OUT in states else ())
                else:
                    new[module] = _OUT if along and states == {_OUT} and not beside else _AFTER
            elif module in self.took:
                joins = name in _ADDS and {_SKIP, _BRANCH} <= states
                if along and (joins or _JOINED in states or states == {_SKIP}):
                    new[module] = _SKIP if states == {_SKIP} else _JOINED
                else:
                    new[module] = _BRANCH
        for t in results(name, args, out):
            self.marks[t] = new
        return out

    def _take(self, operands: Iterable[Tensor]) -> None:
        """Note that something takes these tensors: a module that gave one beside its result cannot be passed by."""
        for path in {path for t in operands for path in self.beside.get(t, ())}:
            self.forms[path] = "it gives a tensor beside its result, which others read"

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for place, t in _given(args, kwargs):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.took[path] = place
                self.marks[t] = {**self.marks.get(t, {}), path: _SKIP}
                break

    def _leave(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = _given(args, kwargs)
        form = _form(self.took.pop(path), given, out) if path in self.took else _NO_BLOCK
        if isinstance(form, Form):
            main, beside = (out, ()) if form.rest is None else (out[0], out[1:])
            state = self.marks.get(main, {}).get(path)
            if state == _BRANCH and form.rest is None:
                form = dataclasses.replace(form, adds=False)
                self.marks[main] = {**self.marks.get(main, {}), path: _OUT}
            elif state != _JOINED:
                form = _NO_BLOCK
            for t in beside:
                if isinstance(t, Tensor) and not any(t is value for _, value in given):
                    self.beside[t] = {path, *self.beside.get(t, ())}
        before = self.forms.setdefault(path, form)
        self.forms[path] = form if before == form else "it is used in several ways"


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Place, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _form(place: Place, given: Sequence[tuple[Place, Any]], out: Any) -> Form | str:
    """How a module is passed by that took its input in one place; or why it cannot be."""
    main = out
    rest: list[tuple[bool, Any]] | None = None
    if type(out) in (tuple, list) and out:
        main, rest = out[0], []
        for extra in out[1:]:
            source = next((p for p, value in given if value is extra and extra is not None), None)
            if source is None and not (extra is None or isinstance(extra, bool | int | float | str | Tensor)):
                return f"it gives a {type(extra).__name__} beside its result, which others may read"
            value = None if isinstance(extra, Tensor) else extra
            rest.append((source is not None, value if source is None else source))
    took = dict(given)[place]
    if not isinstance(main, Tensor) or main.shape != took.shape or main.dtype != took.dtype:
        return _NO_BLOCK
    return Form(place, True, None if rest is None else tuple(rest), type(out))


@contextlib.contextmanager
def passed_by(model: nn.Module, ones: Iterable[Candidate]) -> Iterator[None]:
    """For a while some modules of a copy of the user's model give back what they take.

    They stay in their lists, with their attributes, since the code around them may read these.
    """
    parts = [(model.get_submodule(path), form) for one in ones for path, form in one.forms.items()]
    own = [(vars(module), vars(module).get("forward")) for module, _ in parts]
    for module, form in parts:
        vars(module)["forward"] = functools.partial(_pass_by, form)
    try:
        yield
    finally:
        for space, forward in own:
            del space["forward"]
            if forward is not None:
                space["forward"] = forward


def _pass_by(form: Form, *args: Any, **kwargs: Any) -> Any:
    given = dict(_given(args, kwargs))
    main = given[form.place]
    main = main if form.adds else torch.zeros_like(main)
    if form.rest is None:
        return main
    return form.kind([main, *(given.get(value) if is_place else value for is_place, value in form.rest)])
