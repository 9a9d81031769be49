"""Finding every dropout call of a model: where it stands, what it drops, and what no handler can reach."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur import anatomy
from secateur.dropout.interception.handlers import DropoutCall
from secateur.dropout.interception.isolation import changed, fresh, held, require_rest, twin, undisturbed
from secateur.dropout.interception.listing import Lister, listed
from secateur.support.inputs import Arguments, arguments
from secateur.support.tables import Printed, Table, counted

__all__ = ["Found", "Unreached", "find"]


@dataclass(frozen=True)
class Unreached:
    """Noise that `sample` cannot give to a model.

    Attributes:
        path: the module in whose code it stands, "" for the model itself.
        what: the function, and the line.
        why: it is out of reach, and what to do.
    """

    path: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} in {self.path or 'the model'}: {self.why}"


@dataclass(frozen=True)
class Found(Printed):
    """The dropout of a model, as the inputs given make it run; `str()` is a table, and a loop gives its calls.

    Attributes:
        sequence: each dropout call in the order in which the model makes them; a module that runs twice has its calls
            twice. Calls that never drop anything, not in training either, have a rate of 0.
        unreached: noise that is out of reach.
        writes: the model writes into buffers or other tensors that it holds, in `eval()` too; samples are then taken
            of copies, which share its weights.
    """

    sequence: tuple[DropoutCall, ...]
    unreached: tuple[Unreached, ...]
    writes: bool

    @property
    def calls(self) -> tuple[DropoutCall, ...]:
        """The calls that drop something."""
        return tuple(call for call in self.sequence if call.rate != 0)

    @property
    def off(self) -> int:
        """How many calls drop nothing."""
        return len(self.sequence) - len(self.calls)

    def __len__(self) -> int:
        """How many calls drop something."""
        return len(self.calls)

    def __iter__(self) -> Iterator[DropoutCall]:
        """The calls that drop something, in the order in which the model makes them."""
        return iter(self.calls)

    def table(self) -> Table:
        """One row a call; what is out of reach is in the notes."""
        rows = [
            [c.path or "(model)", c.kind, "" if c.rate is None else f"{c.rate:g}", "x".join(map(str, c.shape))]
            for c in self.calls
        ]
        off = f", {counted(self.off, 'more drops', 'more drop')} nothing" if self.off else ""
        notes = [counted(len(self.calls), "dropout call") + off]
        notes += [f"out of reach: {one}" for one in self.unreached]
        return Table(("where", "kind", "rate", "shape"), rows, notes=notes)


def find(model: nn.Module, inputs: Any) -> Found:
    """List every dropout call that a model makes for some inputs: of modules, of functions, inside fused layers.

    A copy that shares the model's weights runs once in `eval()` and once in `train()`: rates that a
    model passes on only in training (those of `scaled_dot_product_attention`) are seen there, and so is noise that is
    drawn only there, which is out of reach. Dropout: Srivastava et al. 2014.

    Args:
        model: in `eval()`; its weights, buffers and mode stay as they are.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        StateError: the model, or a normalisation in it, is in training mode.
        InputTypeError: no module, or inputs with which a model cannot be called.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.LSTM(8, 8, 2, dropout=0.5)).eval()
    >>> print(find(model, torch.randn(5, 3, 4)))
    where     kind  rate  shape
    -----  -------  ----  -----
    1      dropout   0.2  5x3x8
    2         lstm   0.5  5x3x8
    2 dropout calls
    """
    call = arguments(inputs)
    require_rest(model)
    with undisturbed():
        return look(model, fresh(call))[0]


def look(model: nn.Module, call: Arguments) -> tuple[Found, Any]:
    """Find the dropout calls of a model, `undisturbed`; and what it gives. It may write into the inputs."""
    trained = [p for p in model.parameters() if p.requires_grad]  # others may be written into in training
    copied = twin(model, trained)
    before = held(copied)
    now, output = listed(copied, call, original=model)
    writes = changed(before, held(copied))
    try:
        then = _in_training(twin(model, trained) if writes else copied, call)
    except Exception as error:  # a model may want more in training: targets, a larger batch
        return _found(model, now, None, writes, f"{type(error).__name__}: {error}"), output
    return _found(model, now, then, writes), output


def _in_training(copied: nn.Module, call: Arguments) -> Lister:
    """List what a copy of the model calls in training; normalisation stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in copied.train().modules():
            if anatomy.keeps_statistics(module):
                module.eval()
        return listed(copied, fresh(call))[0]


def _found(model: nn.Module, now: Lister, then: Lister | None, writes: bool, failure: str = "") -> Found:
    scripted = list(_scripted(model))
    unreached = [Unreached(path, "dropout", _SCRIPTED) for path in scripted]
    here = {call.site: call for call in now.noise}
    unreached += [_lost(call, _UNSEEDED) for call in here.values()]
    rates: dict[tuple[Any, ...], float | None] = {}
    if then is None:
        unreached.append(Unreached("", "noise that is there in training only", _UNKNOWN.format(failure)))
    else:
        rates = {site: call.rate if on else 0.0 for site, (call, on) in _numbered(then.calls)}
        met = {site for site, _ in _numbered(now.calls)}
        lost = [call for site, (call, on) in _numbered(then.calls) if on and call.rate != 0 and site not in met]
        unreached += [_lost(call, _HANDWRITTEN) for call in lost]
        only = {call.site: call for call in then.noise if call.site not in here and call.path not in scripted}
        unreached += [_lost(call, _HANDWRITTEN) for call in only.values()]
    # a call that training skipped this time, as some skip whole layers, has the rate that it shows here
    sequence = tuple(replace(call, rate=rates.get(site, call.rate)) for site, (call, _) in _numbered(now.calls))
    return Found(sequence, tuple(unreached), writes)


def _lost(call: DropoutCall, why: str) -> Unreached:
    return Unreached(call.path, f"{call.kind} (line {call.line})", why)


_HANDWRITTEN = (
    "it stands behind `if self.training`, so it is not called in eval(); "
    "write functional.dropout(x, p, self.training), or use nn.Dropout"
)
_SCRIPTED = "torch.jit runs it, which hides its calls; take samples of the module before torch.jit.script"
_UNSEEDED = "it is random in eval() too, and does not follow the seed"
_UNKNOWN = "the model did not run in train() ({}), so it is not known whether there is any"


def _numbered(calls: list[tuple[DropoutCall, bool]]) -> Iterator[tuple[tuple[Any, ...], tuple[DropoutCall, bool]]]:
    """Each call with its place in the code, and how often it has been called before."""
    seen: Counter[Any] = Counter()
    for call, on in calls:
        yield (*call.site, seen[call.site]), (call, on)
        seen[call.site] += 1


def _scripted(model: nn.Module) -> Iterator[str]:
    """Names of scripted or traced parts with noise in their graph."""
    noisy = ("dropout", "bernoulli", "rand")
    inside: str | None = None
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or (inside is not None and name.startswith(inside)):
            continue
        inside = name and f"{name}."
        if any(word in node.kind() for node in module.inlined_graph.nodes() for word in noisy):
            yield name
