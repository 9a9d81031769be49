"""The verbs of fast inference: accelerate a model, explain what was chosen, make it plain again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from secateur.errors import InputError, StateError
from secateur.runtime import native, tuning
from secateur.runtime.candidates import enclose, make_sparse, matrices, survey, zeros_of
from secateur.runtime.chains import Chain, Span, SparseSequential, runs
from secateur.runtime.kernel_plans import Gain, LayerPlan, Plan, Timing, without
from secateur.runtime.swapping import Sparse, Swapped, swap
from secateur.scope import unwrap
from secateur.support.inputs import Arguments, arguments

_Run = tuple[nn.Sequential, Span]


@dataclass(frozen=True)
class _Trace:
    """What an accelerated model carries besides its sparse layers."""

    plan: Plan
    trained: frozenset[str]
    """Parameters that require gradients in the plain model."""


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
    values: torch.dtype = torch.float32,
) -> nn.Module:
    """Copy a model for inference in which every layer runs the faster of its dense and its sparse kernel.

    Linear, Conv1d, Conv2d, LSTM, GRU, MultiheadAttention and transformers' Conv1D are tried, in float32 on the
    CPU. Each is timed in the model, on the example, and stays dense where sparse is not faster. Runs of Linear in an
    nn.Sequential, with ReLU, Dropout and Identity between, are timed as one call too. If in the end the whole model
    is not faster, all of it stays dense. Results equal the plain ones up to rounding.

    The copy is in evaluation mode and its parameters require no gradients. Its `state_dict()` is that of `model`;
    `fast.plan` holds what was chosen (unless the model has a `plan` of its own: then `sc.explain` alone does). A
    layer whose weights change afterwards, through `.data` or NumPy too, raises a StateError when it is called: at the
    next call if all of them changed, within 2,048 calls if a single one did. `secateur.runtime.check_weights` looks at
    each, `secateur.runtime.trust_weights` ends the search. Under `torch.compile` and in an exported program nothing
    looks for such changes. (`torch.compile` refuses every LSTM and GRU, these too, unless
    `torch._dynamo.config.allow_rnn` is True; then each is one operator.)

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as it will be in use; a list
            of these for several batch sizes. Any other size goes as the nearest one.
        threads: CPU threads to tune for; by default as many as torch has now.
        values: dtype of the packed weights. `torch.float16` rounds them (a relative error of 0.0005 at most), which
            makes layers that have to be read from memory faster still; inputs and sums stay float32.
        plan: `fast.plan`, or its `to_dict()`, of an earlier run for the same weights and machine: nothing is timed.

    Returns:
        The fast copy, of the same type.

    Raises:
        InputTypeError: no module, or inputs of another type.
        InputError: `threads` below 1; no example; a lazy or meta parameter; a plan for something else; `values`
            neither float32 nor float16.
        StateError: the model is accelerated already.

    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    >>> masks = sc.prune(model, 0.9)
    >>> fast = sc.accelerate(model, torch.zeros(1, 256))
    >>> torch.allclose(fast(torch.ones(1, 256)), model(torch.ones(1, 256)), atol=1e-5)
    True
    """
    model = unwrap(model)
    calls = [arguments(one) for one in (example_inputs if isinstance(example_inputs, list) else [example_inputs])]
    given = plan if plan is None or isinstance(plan, Plan) else Plan.from_dict(plan)
    _check(model, calls, threads, values)
    with _threads(threads), torch.inference_mode(False):
        fast, trained = _copy(model)
        tuned = _Tuning(model, fast, calls, values is torch.float16)
        tuned.take(given) if given is not None else tuned.measure()
        found = tuned.found()
    if not hasattr(fast, "plan"):
        fast.__dict__["plan"] = found
    fast.__dict__["_secateur"] = _Trace(found, trained)
    return fast


def explain(fast: nn.Module) -> Plan:
    """Tell which kernel each layer of an accelerated model runs, for how many rows, and why.

    Returns:
        The plan; `str()` is a table of layers with their times, and a line on the whole model.

    Raises:
        StateError: the model was not accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> print(sc.explain(fast).layers[0].reason)
    too dense: 0.00 % zeros
    """
    trace = unwrap(fast).__dict__.get("_secateur")
    if trace is None:
        raise StateError(
            f"this {type(fast).__name__} was not accelerated, so there is nothing to explain. "
            "Arguments fast = sc.accelerate(model, example_inputs), then sc.explain(fast)."
        )
    plan: Plan = trace.plan
    return plan


def dense(fast: nn.Module) -> nn.Module:
    """Copy an accelerated model as a plain one: torch's own layers, the weights as they are now, no trace.

    Args:
        fast: left as it is; or a model that contains one.

    Raises:
        StateError: nothing in the model is accelerated.

    >>> model = nn.Linear(8, 8)
    >>> type(sc.dense(sc.accelerate(model, torch.zeros(1, 8)))) is nn.Linear
    True
    """
    fast = unwrap(fast)
    if not _accelerated(fast):
        raise StateError(f"nothing in this {type(fast).__name__} is accelerated: it is plain already")
    with torch.inference_mode(False):
        plain = copy.deepcopy(fast)
    for module in list(plain.modules()):
        if isinstance(module, Swapped):
            module.restore()
        trace = module.__dict__.pop("_secateur", None)
        if trace is not None:
            if module.__dict__.get("plan") == trace.plan:
                del module.__dict__["plan"]
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trace.trained)
    return plain


def check_weights(fast: nn.Module) -> None:
    """Compare each weight of an accelerated model with what was packed.

    Args:
        fast: an accelerated model, or one that contains it.

    Raises:
        StateError: a weight has changed since, so that results would be old ones; or nothing is accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> check_weights(fast)
    """
    for layer in _sparse_layers(fast):
        layer.require_fresh()


def trust_weights(fast: nn.Module, trusted: bool = True) -> None:
    """Look for changed weights no more, or again: for who edits none, and wants the last 2 or 3 % of speed.

    What torch itself counts (in-place updates, `load_state_dict`, replaced parameters) is an error in any case; edits
    through `.data`, NumPy or C pass unnoticed, and results are then those of the old weights.

    Args:
        fast: an accelerated model, or one that contains it; its copies do as it does.
        trusted: False to look again.

    Raises:
        StateError: a weight has changed already; or nothing is accelerated.

    >>> fast = sc.accelerate(nn.Linear(8, 8), torch.zeros(1, 8))
    >>> trust_weights(fast)
    """
    check_weights(fast)
    for layer in _sparse_layers(fast):
        layer._trusted = trusted
        layer.stamp()
    for module in fast.modules():
        if isinstance(module, SparseSequential):
            module.steps()


def _sparse_layers(fast: nn.Module) -> list[Sparse]:
    fast = unwrap(fast)
    if not _accelerated(fast):
        raise StateError(f"nothing in this {type(fast).__name__} is accelerated: give what sc.accelerate returned")
    return [module for module in fast.modules() if isinstance(module, Sparse)]


class _Tuning:
    """The copy on its way: layers swapped, tried and, where they do not gain, put back."""

    def __init__(self, model: nn.Module, fast: nn.Module, calls: Sequence[Arguments], half: bool) -> None:
        self.model, self.fast, self.calls, self.half = model, fast, calls, half
        self.values = "float16" if half else "float32"
        self.plans = {layer.name: layer for layer in survey(fast)}
        self.gains: tuple[Gain, ...] = ()
        modules = dict(fast.named_modules())
        self.layers = {name: make_sparse(modules[name], name) for name, layer in self.plans.items() if not layer.reason}
        enclose(fast)
        with tuning.recording(self.layers) as recorders, torch.inference_mode():
            self.seen = [tuning.look(fast, recorders, call) for call in calls]
        for name, layer in self.layers.items():
            self._pack(name, layer)
        self.runs = dict(_runs(fast)) if native.library() is not None else {}
        self.plans.update({name: _run_plan(name, *run) for name, run in self.runs.items()})

    def _pack(self, name: str, layer: Sparse) -> None:
        if not any(name in seen for seen in self.seen):
            self.plans[name] = replace(self.plans[name], reason="the example does not reach it")
            return
        try:
            layer.pack(self.half)
        except InputError as error:
            self.plans[name] = replace(self.plans[name], reason=str(error))
            return
        self.plans[name] = replace(self.plans[name], pattern=tuning.pattern(matrices(layer), self.half))

    def measure(self) -> None:
        """Time all layers, then the runs of them that could be fused, then the model, and keep what is faster."""
        self._time({name: layer for name, layer in self.layers.items() if not self.plans[name].reason})
        for name, layer in self.layers.items():
            layer._choices = self.plans[name].choices
        self._time(self._reached())
        self._settle()
        if any(layer.choices for layer in self.plans.values()):
            self.gains = tuple(tuning.gain(self.model, self.fast, call) for call in self.calls)
            self._reject()
            self._settle()

    def _time(self, tried: Mapping[str, Sparse | Chain]) -> None:
        """Time layers or runs, and plan to have those sparse, or fused, that are faster so."""
        found: dict[str, dict[int, Timing]] = {name: {} for name in tried}
        patterns = {name: self.plans[name].pattern for name in tried}
        with tuning.recording(tried) as recorders, torch.inference_mode():
            for call, seen in zip(self.calls, self.seen, strict=True):
                for name, timings in tuning.choose(self.fast, recorders, call, seen, patterns).items():
                    found[name].update({timing.bucket: timing for timing in timings})
        for name in tried:
            measured = tuple(found[name][b] for b in sorted(found[name]))
            self.plans[name] = without(replace(self.plans[name], timings=measured), set(), "not faster")

    def _reached(self) -> dict[str, Chain]:
        """The runs that the examples lead to, in place, and how many rows they have."""
        found = self._fuse(dict.fromkeys(self.runs, 0))
        with tuning.recording(found) as recorders, torch.inference_mode():
            for call, seen in zip(self.calls if found else (), self.seen, strict=False):
                seen.update(tuning.look(self.fast, recorders, call))
        for name in found:
            if not any(name in seen for seen in self.seen):
                self.plans[name] = replace(self.plans[name], reason="the example does not reach it")
        return {name: chain for name, chain in found.items() if not self.plans[name].reason}

    def found(self) -> Plan:
        """All that was chosen, and where."""
        layers = tuple(self.plans.values())
        return Plan(tuning.cpu(), native.isa(), torch.get_num_threads(), layers, self.gains, self.values)

    def take(self, plan: Plan) -> None:
        """Choose as an earlier run did.

        Raises:
            InputError: it was for other weights, or measured elsewhere.
        """
        here = (tuning.cpu(), native.isa(), torch.get_num_threads())
        if (plan.cpu, plan.isa, plan.threads) != here:
            raise InputError(
                f"the plan was measured on {plan.cpu} with {plan.isa} kernels and {plan.threads} threads, and this is "
                f"{here[0]}, {here[1]}, {here[2]}. Leave plan out, and the model is tuned here."
            )
        if plan.values != self.values:
            raise InputError(f"the plan is for values=torch.{plan.values}, and this call is for torch.{self.values}")
        planned = {layer.name: layer for layer in plan.layers}
        for name in [*planned, *self.plans]:
            old, new = planned.get(name), self.plans.get(name)
            if old is None or new is None or _identity(old) != _identity(new):
                raise InputError(
                    f"the plan is for another model: {name!r} is {_words(new)} here, and {_words(old)} in the plan. "
                    "Leave plan out, and the model is tuned anew."
                )
        self.plans, self.gains = planned, plan.gains
        self._settle()

    def _reject(self) -> None:
        """Put back to dense the row classes of each example that did not get faster as a whole."""
        kept = [seen for seen, gain in zip(self.seen, self.gains, strict=True) if gain.faster]
        lost = [seen for seen, gain in zip(self.seen, self.gains, strict=True) if not gain.faster]
        for name, layer in self.plans.items():
            saved = {b for seen in kept for b in seen.get(name, ())}
            buckets = {b for seen in lost for b in seen.get(name, ())} - saved
            if layer.timings:
                self.plans[name] = without(layer, buckets, "the whole model was not faster")

    def _settle(self) -> None:
        """Give the layers and runs their choices, and put those back that are always dense."""
        choices = {name: self.plans[name].choices for name in self.runs}
        fused = {id(m) for name, run in self.runs.items() if choices[name] for m in _modules(*run)}
        for name, layer in self.layers.items():
            if not isinstance(layer, Sparse):
                continue
            layer._choices = self.plans[name].choices
            if not layer._choices and id(layer) not in fused:
                layer.restore()
        self._fuse({name: chosen for name, chosen in choices.items() if chosen})
        enclose(self.fast)

    def _fuse(self, choices: Mapping[str, int]) -> dict[str, Chain]:
        """Fuse these runs for these row classes and no others."""
        found: dict[str, Chain] = {}
        for module in {id(module): module for module, _ in self.runs.values()}.values():
            spans = {name: span for name, (m, span) in self.runs.items() if m is module and name in choices}
            if isinstance(module, Swapped):
                module.restore()
            if spans:
                swap(module, SparseSequential)
                assert isinstance(module, SparseSequential)
                fused = module.fuse({span: choices[name] for name, span in spans.items()})
                found.update(zip(spans, fused, strict=True))
        return found


def _check(model: nn.Module, calls: Sequence[Arguments], threads: int | None, values: torch.dtype) -> None:
    if not calls:
        raise InputError("example_inputs is an empty list: give at least one example to tune for")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, but a model needs one at least. Leave it out for torch's own.")
    if values not in (torch.float32, torch.float16):
        raise InputError(f"values is {values}: packed weights are torch.float32 or, rounded, torch.float16")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise InputError(
                f"{name!r} has no data (it is lazy or on the meta device), so the model cannot run. "
                "Arguments it once, or use `to_empty` and `load_state_dict`, before you accelerate."
            )
    if _accelerated(model):
        raise StateError("the model is accelerated already. To tune it anew: sc.accelerate(sc.dense(model), ...)")


def _accelerated(model: nn.Module) -> bool:
    return any(isinstance(module, Swapped) or "_secateur" in module.__dict__ for module in model.modules())


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


def _copy(model: nn.Module) -> tuple[nn.Module, frozenset[str]]:
    """A copy in evaluation mode without gradients, and the names of the parameters that required them."""
    try:
        fast = copy.deepcopy(model)
    except RuntimeError as error:
        raise InputError(
            f"the model cannot be copied: {error} Weights that a hook computes (weight_norm, torch.nn.utils.prune) "
            "are the usual cause: make them plain first"
        ) from error
    for module in fast.modules():
        module.training = False
    trained = frozenset(name for name, parameter in fast.named_parameters() if parameter.requires_grad)
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    return fast, trained


def _runs(model: nn.Module) -> Iterator[tuple[str, _Run]]:
    """What could be fused: by a name as Python spells it, the Sequential and where in it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for a, b in runs([*module._modules.values()]):
                yield f"{name}[{a}:{b}]", (module, (a, b))


def _modules(module: nn.Sequential, span: Span) -> list[nn.Module]:
    return [*module._modules.values()][slice(*span)]


def _run_plan(name: str, module: nn.Sequential, span: Span) -> LayerPlan:
    chain = Chain(_modules(module, span))
    weights = [layer.weight for layer in chain.layers]
    return LayerPlan(
        name, "Sequential", chain.widths, zeros_of(weights), tuning.pattern(weights, chain.layers[0]._half)
    )


def _identity(layer: LayerPlan) -> tuple[Any, ...]:
    return layer.kind, layer.shape, layer.pattern


def _words(layer: LayerPlan | None) -> str:
    if layer is None:
        return "missing"
    return f"{layer.kind} {' x '.join(map(str, layer.shape))} with zeros {layer.pattern[:8] or '(not tried)'}"
