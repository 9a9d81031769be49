"""Tuning: which layers of a model, which runs and which networks of them are faster sparse on the examples."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.errors import InputError, listed, warn
from secateur.runtime import native, products, tuning
from secateur.runtime.candidates import enclose, make_sparse, matrices, survey
from secateur.runtime.chains import Fused
from secateur.runtime.fusions import Fusions
from secateur.runtime.kernel_plans import Gain, KernelPlan, LayerPlan, Timing, require_alike, without
from secateur.runtime.networks import SparseNetwork
from secateur.runtime.packed_layers import PackedLayers
from secateur.runtime.releasing import Releasable
from secateur.runtime.semi_structured import SemiStructuredLinear, disagreement
from secateur.runtime.swapping import Sparse
from secateur.runtime.tuning import Tried
from secateur.support.inputs import Arguments
from secateur.support.machine import last_level_cache

__all__: list[str] = []  # reached through secateur.accelerate alone

_ALIKE = 0.02
"""Difference of sparsity up to which layers of one shape count as one kind."""

_CODE_BYTES = 16
"""Of generated code and its weights, for a non-zero."""

_INTERRUPTED = "not timed: the tuning was interrupted"

_DENSE = "not sparse for all examples"
_LOSSY = "what was packed has not each bit of them"

_T = TypeVar("_T", bound=Tried)


class Tuning:
    """The copy on its way: layers swapped, tried and, where they do not gain, put back."""

    def __init__(
        self,
        model: nn.Module,
        fast: nn.Module,
        calls: Sequence[Arguments],
        *,
        values: torch.dtype,
        checked: bool,
        generated: bool,
    ) -> None:
        self.model, self.fast, self.calls, self.values, self.checked = model, fast, calls, values, checked
        self.generated = generated and native.generates()
        self.plans = {layer.name: layer for layer in survey(fast)}
        self.gains: tuple[Gain, ...] = ()
        self.kept = ""
        """Which dense weights were not released although that was asked for, and why."""
        self.interrupted = ""
        """What was timed and what was not, if somebody had not the time to wait."""
        self.examples, self.unfinished = len(calls), False
        self.gpu = tuning.gpus(fast)
        modules = dict(fast.named_modules())
        self.layers = {name: make_sparse(modules[name], name) for name, layer in self.plans.items() if not layer.reason}
        enclose(fast)
        self.seen: list[tuning.Seen] = []
        self.fusions = Fusions(fast)

    @property
    def steps(self) -> int:
        """Steps that are reported: one a layer by `pack`, and four an example by `measure`.

        These are layers, networks, runs and the whole model.
        """
        return len(self.layers) + 4 * len(self.calls)

    def pack(self, done: Callable[[float], None]) -> None:
        """Pack the weights of the layers that the examples reach, and find what of them could be one call.

        Args:
            done: is told of each of the `steps`.
        """
        with tuning.recording(self.layers) as recorders, torch.inference_mode():
            self.seen = [tuning.look(self.fast, recorders, call) for call in self.calls]
        for name, layer in [*self.layers.items()]:
            self._pack(name, layer)
            if self.plans[name].reason:
                self.layers.pop(name).restore()
            done(1)
        reason = "each layer looks at its inputs" if self.checked else ""
        self.plans.update({plan.name: replace(plan, reason=reason) for plan in self.fusions.find()})

    def _pack(self, name: str, layer: Sparse) -> None:
        if not any(name in seen for seen in self.seen):
            self.plans[name] = replace(self.plans[name], reason="the example does not reach it")
            return
        layer._checked = self.checked
        try:
            layer.pack(self.values)
        except InputError as error:
            self.plans[name] = replace(self.plans[name], reason=str(error))
            return
        self.plans[name] = replace(self.plans[name], pattern=tuning.pattern(matrices(layer), self.values))
        nonzeros = (1 - self.plans[name].sparsity) * sum(weight.numel() for weight in matrices(layer))
        bucket = max(b for seen in self.seen for b in seen.get(name, ()))
        if self.generated and _worth_code(layer, bucket, nonzeros):
            layer.generate()

    def measure(self, done: Callable[[float], None]) -> None:
        """Time all layers, then networks and runs of them as one call, then the model, and keep what is faster.

        Args:
            done: is told of each of the `steps`.

        Raises:
            KeyboardInterrupt: before anything was timed; later it ends the tuning, and what was chosen so far stands.
        """
        with self._interruptible():
            self._time({name: layer for name, layer in self.layers.items() if not self.plans[name].reason}, done)
            for name, layer in self.layers.items():
                layer.choose(self.plans[name].choices, self.plans[name].generated)
            self._time(self._reached(self.fusions.install(self._open(self.fusions.networks))), done)
            self._leave_to_networks()
            self._time(self._reached(self.fusions.fuse(self._open(self.fusions.runs))), done)
        self._agree()
        self._settle()
        if not self.interrupted and any(layer.choices for layer in self.plans.values()):
            with self._interruptible():
                for call in self.calls:
                    self.gains += (tuning.gain(self.model, self.fast, call),)
                    done(1)
            self._reject()
            self._settle()
        self._enter()

    def _enter(self) -> None:
        """Note for which row classes a layer that alone stays dense is computed by a run or a network."""
        for host in (*self.fusions.runs, *self.fusions.networks):
            sparse = {timing.bucket for timing in self.plans[host].timings if timing.sparse}
            inside = self.fusions.ids([host]) if self.plans[host].choices else set()
            for name, layer in self.layers.items():
                if id(layer) in inside:
                    timings = [
                        replace(t, within=host or "(the model)") if self._taken(name, host, t, sparse) else t
                        for t in self.plans[name].timings
                    ]
                    self.plans[name] = replace(self.plans[name], timings=tuple(timings))

    def _taken(self, name: str, host: str, timing: Timing, sparse: set[int]) -> bool:
        """Whether each example that led this row class to a layer has the host run as one call."""
        led = [seen.get(host, set()) for seen in self.seen if timing.bucket in seen.get(name, ())]
        return not timing.sparse and bool(led) and all(buckets and buckets <= sparse for buckets in led)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Go on behind this where somebody interrupts it, if anything was timed."""
        try:
            yield
        except KeyboardInterrupt:
            if not any(layer.timings for layer in self.plans.values()):
                raise
            for name, layer in self.plans.items():
                if not layer.reason and not layer.timings:
                    self.plans[name] = replace(layer, reason=_INTERRUPTED)
            self.interrupted = self._what_stands()

    def _what_stands(self) -> str:
        timed = [layer for layer in self.plans.values() if layer.timings]
        others = [name for name, layer in self.plans.items() if layer.reason == _INTERRUPTED]
        fused = {*self.fusions.runs, *self.fusions.networks}
        told = [
            f", and {listed([name or '(the model)' for name in names])} {what}"
            for what, names in (
                ("stay dense", [name for name in others if name not in fused]),
                ("run layer by layer", [name for name in others if name in fused]),
            )
            if names
        ]
        unseen = len(self.calls) - len(self.gains) if any(layer.choices for layer in timed) else 0
        classes = any(
            seen.get(layer.name, set()) - {timing.bucket for timing in layer.timings}
            for seen in self.seen
            for layer in timed
        )
        self.unfinished = bool(others or unseen or classes)
        words = [
            f"the tuning was interrupted: {len(timed)} of {len(timed) + len(others)} layers and runs of layers were "
            f"timed and keep what was chosen{''.join(told)}"
        ]
        if unseen:
            words.append(
                f"The whole model was not compared with the plain one on {unseen} of {len(self.calls)} examples"
            )
        if self.unfinished:
            words.append("To tune the rest call sc.accelerate again: what was timed is remembered in this process")
        return ". ".join(words)

    def _leave_to_networks(self) -> None:
        """Try no run in a module that a network takes, and have the networks aside while the others are tried."""
        for name in self.fusions.runs_in(name for name in self.fusions.networks if self.plans[name].choices):
            self.plans[name] = replace(self.plans[name], reason="part of a network")
        self.fusions.install({})

    def _time(self, tried: Mapping[str, Tried], done: Callable[[float], None]) -> None:
        """Time one layer, run or network of each kind, and plan to have those sparse, or fused, that are faster so."""
        kinds = self._kinds(tried)
        first = {name: tried[name] for name in kinds.values()}
        found: dict[str, dict[int, Timing]] = {name: {} for name in first}
        patterns = {name: self.plans[name].pattern for name in first}
        untimed = _INTERRUPTED
        try:
            with tuning.recording(first) as recorders, torch.inference_mode():
                for call, seen in zip(self.calls, self.seen, strict=True):
                    for name, timing in tuning.choose(self.fast, recorders, call, seen, patterns):
                        found[name][timing.bucket] = timing
                    done(1)
            untimed = "not faster"
        finally:
            for name in tried:
                measured = tuple(found[kinds[name]][b] for b in sorted(found[kinds[name]]))
                reason = "not faster" if measured else untimed
                self.plans[name] = without(replace(self.plans[name], timings=measured), set(), reason)

    def _kinds(self, tried: Mapping[str, Tried]) -> dict[str, str]:
        """For each layer or run the first of its kind, which is timed for all: but for the weights they are equal."""
        firsts: dict[tuple[Any, ...], str] = {}
        kinds = {}
        for name, layer in tried.items():
            rows = tuple(tuple(sorted(seen.get(name, ()))) for seen in self.seen)
            near = round(self.plans[name].sparsity / _ALIKE)
            key = type(layer).__name__, repr(layer), layer.has_code, near, rows
            kinds[name] = firsts.setdefault(key, name)
        return kinds

    def _open(self, names: Iterable[str]) -> dict[str, int]:
        """Those that nothing is known against, for no row class yet."""
        return {name: 0 for name in names if not self.plans[name].reason}

    def _reached(self, found: Mapping[str, _T]) -> dict[str, _T]:
        """The runs or networks in place that the examples lead to, and how many rows they have."""
        with tuning.recording(found) as recorders, torch.inference_mode():
            for call, seen in zip(self.calls if found else (), self.seen, strict=False):
                seen.update(tuning.look(self.fast, recorders, call))
        for name in found:
            if not any(name in seen for seen in self.seen):
                self.plans[name] = replace(self.plans[name], reason="the example does not reach it")
        for name, one in found.items():
            if isinstance(one, PackedLayers | SparseNetwork) and not one.agrees:
                self.plans[name] = replace(self.plans[name], reason="as one call it computes something else")
        return {name: one for name, one in found.items() if not self.plans[name].reason}

    def _agree(self) -> None:
        """Have the layers on a CUDA device dense if with them the model computes something else."""
        tried = {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(layer, SemiStructuredLinear) and self.plans[name].choices
        }
        for call in self.calls if tried else ():
            for name, layer in tried.items():
                layer.choose(self.plans[name].choices)
            if told := disagreement(self.fast, call, [*tried.values()]):
                for name in tried:
                    self.plans[name] = without(self.plans[name], {t.bucket for t in self.plans[name].timings}, told)
                return

    def found(self) -> KernelPlan:
        """All that was chosen, and where."""
        layers = tuple(self._weighed(layer) for layer in self.plans.values())
        values = str(self.values).removeprefix("torch.")
        return KernelPlan(
            tuning.cpu(),
            native.isa(),
            torch.get_num_threads(),
            layers,
            self.gains,
            values,
            self.gpu,
            self.kept,
            self.examples,
            self.unfinished,
        )

    def release(self) -> None:
        """Release the dense weights of layers that are sparse for all inputs, and copy those that stay.

        Until now the copy shares the weights of the given model.
        """
        kept: dict[str, list[str]] = {}
        given: list[weakref.ref[Any]] = []  # that hold no weight, so that its memory is free at once
        held = Counter(id(p) for module in self.fast.modules() for p in module._parameters.values())
        for name, layer in self.layers.items():
            plan = self.plans[name]
            if reason := self._needed(layer, plan, held):
                kept.setdefault(reason, []).append(name or "the model")
                continue
            assert isinstance(layer, Releasable)
            layer.choose(products.ALL, plan.generated)
            weight = weakref.ref(layer.weight)
            if layer.release():
                given.append(weight)
            else:
                kept.setdefault(_LOSSY, []).append(name or "the model")
        self.kept = _told(kept, bool(given))
        if _LOSSY in kept:
            warn(
                f"{listed(kept[_LOSSY])}: the dense weights are kept, as {_LOSSY}. They have "
                f"values that {self.values} rounds, or negative zeros. To release them, make them so first:\n"
                "with torch.no_grad():\n"
                "    for weight in model.parameters():\n"
                "        if weight.ndim == 2 and weight.dtype == torch.float32:\n"
                f"            weight.copy_(weight.to({self.values}) + 0.0)"
            )
        for parameter in self.fast.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.clone()
        for layer in self.layers.values():
            if isinstance(layer, Sparse):
                layer.stamp()
        for module in self.fast.modules():
            if isinstance(module, Fused):
                module.steps()  # anew: the layers have other tensors
        for one in given:
            if (held_elsewhere := one()) is not None:  # by a list of the model, say
                held_elsewhere.data = held_elsewhere.data.clone()

    def _needed(self, layer: nn.Module, plan: LayerPlan, held: Mapping[int, int]) -> str:
        """Why a layer keeps its dense weights, in a few words; an empty string if it can do without."""
        if not plan.choices or not all(t.sparse for t in plan.timings):
            fused = any(self.plans[name].choices for name in (*self.fusions.runs, *self.fusions.networks))
            return f"{_DENSE}{' by itself' if fused else ''}"
        if not isinstance(layer, Releasable):
            return "a kind of layer that keeps them"
        return "shared with another module" if held[id(layer.weight)] > 1 else ""

    def _weighed(self, plan: LayerPlan) -> LayerPlan:
        """A layer's plan with what its packed weights and its code take."""
        layer: Any = self.layers.get(plan.name)
        if not isinstance(layer, Sparse):  # dense again, or a run
            return plan
        packed = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name.startswith("packed_"))
        code = sum(code.bytes for code in layer._codes.values())
        released = layer.weight.nbytes if isinstance(layer, Releasable) and layer._released else 0
        return replace(plan, packed_bytes=packed, code_bytes=code, released_bytes=released)

    def take(self, plan: KernelPlan) -> None:
        """Choose as an earlier run did, but for what computes something else on the examples.

        Raises:
            InputError: it was for other weights, or measured elsewhere.
        """
        require_alike(plan, self.found())
        self.plans, self.gains = {layer.name: layer for layer in plan.layers}, plan.gains
        self.examples, self.unfinished = plan.examples, plan.interrupted
        self._reached(self.fusions.install(self._open(self.fusions.networks)))
        self.fusions.install({})
        self._reached(self.fusions.fuse(self._open(self.fusions.runs)))
        self._agree()
        self._settle()

    def _reject(self) -> None:
        """Put back to dense the row classes of each example that did not get faster as a whole."""
        lost = {i for i, gain in enumerate(self.gains) if not gain.faster}
        for name, layer in self.plans.items():
            saved = {b for i, seen in enumerate(self.seen) if i not in lost for b in seen.get(name, ())}
            buckets = {b for i in lost for b in self.seen[i].get(name, ())} - saved
            if layer.timings:
                self.plans[name] = without(layer, buckets, "the whole model was not faster")

    def _settle(self) -> None:
        """Give layers, runs and networks their choices, and put those back that are always dense."""
        self.fusions.install({})
        names = (*self.fusions.runs, *self.fusions.networks)
        choices = {name: chosen for name in names if (chosen := self.plans[name].choices)}
        fused = self.fusions.ids(choices)
        for name, layer in self.layers.items():
            if not isinstance(layer, Sparse):
                continue
            layer.choose(self.plans[name].choices, self.plans[name].generated)
            if not self.plans[name].generated:
                layer._codes.clear()
            if not layer._choices and id(layer) not in fused:
                layer.restore()
        self.fusions.fuse({name: choices[name] for name in self.fusions.runs if name in choices})
        self.fusions.install({name: choices[name] for name in self.fusions.networks if name in choices})


def _told(kept: Mapping[str, Sequence[str]], released: bool) -> str:
    """In words: which layers keep their dense weights, by the reason; empty if none does."""
    told = "; ".join(f"{listed(names)} ({reason})" for reason, names in kept.items())
    if released:
        return f"dense weights kept: {told}" if kept else ""
    if all(reason.startswith(_DENSE) for reason in kept):
        reason = next(iter(kept), _DENSE)
        return f"dense weights released: none, as no layer runs {reason.removeprefix('not ')}"
    return f"dense weights released: none; kept: {told}"


def _worth_code(layer: Sparse, bucket: int, nonzeros: float) -> bool:
    """Whether to try generated code for up to 2 ** bucket rows: to read it from memory for a few does not pay."""
    if layer.code_from is None or bucket < layer.code_from:
        return False
    return bucket > 5 or _CODE_BYTES * nonzeros <= last_level_cache() / 2
