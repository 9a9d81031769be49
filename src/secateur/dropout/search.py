"""Finding every dropout call of a model: where it stands, what it drops, and what no handler can reach."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.costs import Call as Arguments
from secateur.costs import devices
from secateur.dropout.calls import Call, Lister, handling
from secateur.errors import InputTypeError, StateError
from secateur.measurement import arguments
from secateur.tables import Table

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
class Found:
    """The dropout of a model, as the inputs given make it run; `str()` is a table.

    Attributes:
        calls: each dropout call in the order in which the model makes them, those in a module that runs twice twice.
        unreached: noise that is out of reach.
        off: dropout calls that drop nothing, in training either: a rate of 0, or `training=False` for good.
    """

    calls: tuple[Call, ...]
    unreached: tuple[Unreached, ...]
    off: int
    sequence: tuple[Call, ...]
    """The calls, and those that are off with a rate of 0: what `sample` meets."""

    def table(self) -> Table:
        """One row a call; what is out of reach is in the notes."""
        rows = [
            [c.path or "(model)", c.kind, "" if c.rate is None else f"{c.rate:g}", "x".join(map(str, c.shape))]
            for c in self.calls
        ]
        notes = [f"{len(self.calls)} dropout calls" + (f", {self.off} more drop nothing" if self.off else "")]
        notes += [f"out of reach: {one}" for one in self.unreached]
        return Table(("where", "kind", "rate", "shape"), rows, notes=notes)

    def __str__(self) -> str:
        return self.table().text()


def find(model: nn.Module, inputs: Any) -> Found:
    """List every dropout call that a model makes for some inputs: of modules, of functions, inside fused layers.

    The model runs once as it is, in `eval()`, and a copy that shares its weights runs once in `train()`: rates that a
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
    with at_rest():
        return look(model, fresh(call))[0]


def look(model: nn.Module, call: Arguments) -> tuple[Found, Any]:
    """Find the dropout calls of a model that is `at_rest`; and what the model gives. It may write into the inputs."""
    now, output = listed(model, call)
    try:
        then = _in_training(model, call)
    except Exception as error:  # a model may want more in training: targets, a larger batch
        return _found(model, now, None, f"{type(error).__name__}: {error}"), output
    return _found(model, now, then, ""), output


def require_rest(model: nn.Module) -> None:
    """See that running a model changes nothing in it.

    Raises:
        InputTypeError: no module; StateError: it is in training mode, or a normalisation in it is; compiled code calls.
    """
    if torch.compiler.is_compiling():
        raise StateError(_COMPILING)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if model.training and "train" not in vars(model):  # an exported graph is what it is, whatever its flag says
        raise StateError("the model is in training mode: call model.eval() first; its dropout is switched on for you")
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
            raise StateError(f"{name} is in training mode and would change its statistics: call model.eval() first")


@contextmanager
def at_rest() -> Iterator[None]:
    """No gradients, and no compiled code, in which no call is seen.

    Raises:
        StateError: code that `torch.compile` compiles has called this.
    """
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes a second to import
            try:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:
                raise StateError(_COMPILING) from error
        yield


def listed(model: nn.Module, call: Arguments) -> tuple[Lister, Any]:
    """Run a model and list its dropout calls; what it gives, too."""
    names = {
        id(module): name.replace("_orig_mod.", "").removesuffix("_orig_mod") for name, module in model.named_modules()
    }
    lister = Lister(names)
    with handling(lister):
        return lister, model(*call[0], **call[1])


def _in_training(model: nn.Module, call: Arguments) -> Lister:
    # weights that are trained are shared; buffers and others are copied, as a forward in training may write into them
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if p.requires_grad}
    twin = copy.deepcopy(model, shared).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    cuda = [device for device in devices(model) if device.type == "cuda"]
    plain = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda):
            warnings.simplefilter("ignore")
            before = torch.get_rng_state()
            lister, _ = listed(twin, fresh(call))
            same = bool(torch.equal(before, torch.get_rng_state())) and plain[0] == random.getstate()
            lister.moved = not same or str(plain[1]) != str(np.random.get_state())
            return lister
    finally:
        random.setstate(plain[0])
        np.random.set_state(plain[1])


def fresh(call: Arguments) -> Arguments:
    """Copy the tensors among some inputs: a model may write into them."""
    copied: Arguments = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    return copied


def _found(model: nn.Module, now: Lister, then: Lister | None, failure: str) -> Found:
    unreached = [Unreached(path, "dropout", _SCRIPTED) for path in _scripted(model)]
    unreached += [Unreached(c.path, f"{c.kind} (line {c.line})", _UNSEEDED) for c in now.random]
    rates: dict[tuple[Any, ...], float | None] = {}
    if then is None:
        unreached.append(Unreached("", "noise that is there in training only", _UNKNOWN.format(failure)))
        rates = {site: call.rate for site, (call, _) in _numbered(now.calls)}
    else:
        rates = {site: call.rate if on else 0.0 for site, (call, on) in _numbered(then.calls)}
        here = {site for site, _ in _numbered(now.calls)}
        lost = [call for site, (call, on) in _numbered(then.calls) if on and call.rate != 0 and site not in here]
        unreached += [Unreached(c.path, f"{c.kind} (line {c.line})", _HANDWRITTEN) for c in lost]
        known = Counter(call.site for call in now.random)
        only = Counter(call.site for call in then.random) - known
        unreached += [Unreached(path, f"{kind} (line {line})", _HANDWRITTEN) for path, line, kind in only]
        if then.moved and not then.random:
            unreached.append(Unreached("", "random numbers", _HIDDEN))
    # a call that training skipped this time, as some skip whole layers, has the rate that it shows here
    sequence = tuple(replace(call, rate=rates.get(site, call.rate)) for site, (call, _) in _numbered(now.calls))
    calls = tuple(call for call in sequence if call.rate != 0)
    return Found(calls, tuple(unreached), len(sequence) - len(calls), sequence)


_COMPILING = (
    "compiled code has called this, and torch.compile cannot trace it: call it outside of the compiled function, "
    "on a compiled model if you like"
)
_HANDWRITTEN = (
    "it stands behind `if self.training`, so it is not called in eval(); "
    "write functional.dropout(x, p, self.training), or use nn.Dropout"
)
_SCRIPTED = "torch.jit runs it, and none of its calls is seen; take samples of the module before torch.jit.script"
_HIDDEN = "in train() some are drawn by a call that is not seen (of Python, of numpy, of compiled code)"
_UNSEEDED = "it is random in eval() too, and does not follow the seed"
_UNKNOWN = "the model did not run in train() ({}), so it is not known whether there is any"


def _numbered(calls: list[tuple[Call, bool]]) -> Iterator[tuple[tuple[Any, ...], tuple[Call, bool]]]:
    """Each call with its place in the code, and how often it has been called before."""
    seen: Counter[Any] = Counter()
    for call, on in calls:
        yield (*call.site, seen[call.site]), (call, on)
        seen[call.site] += 1


def _scripted(model: nn.Module) -> Iterator[str]:
    """Names of scripted or traced parts with noise in their graph."""
    noisy = ("dropout", "bernoulli", "rand")
    inside = ""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        if any(word in node.kind() for node in module.inlined_graph.nodes() for word in noisy):
            yield name
