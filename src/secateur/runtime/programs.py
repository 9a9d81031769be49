"""What runs in the place of a module's forward: its graph, in which each region is one native call."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import StateError
from secateur.runtime import native, products
from secateur.runtime.convolutions import SparseConv2d, spreading
from secateur.runtime.graphs import fingerprint
from secateur.runtime.layouts import readable, strided
from secateur.runtime.operations import CONVOLUTION
from secateur.runtime.region_layouts import result_strides
from secateur.runtime.regions import Region, Step
from secateur.runtime.swapping import held_at
from secateur.runtime.weight_checks import pointers, seen_to_differ, version, watch

__all__: list[str] = []  # reached through secateur.accelerate alone

_Size = tuple[int, int, int]
_SHAPES = 256  # of inputs, for which steps are kept


class Bound:
    """The tensors of a program's layers as they are now, and the steps of its regions with their addresses.

    It looks for tensors that hold something else now. That one was replaced is noticed by `Attributes`, which compares
    by value: so another tensor of one value passes there if that is equal. These are compared by identity here.

    Raises:
        StateError: weights have changed since they were packed.
        ValueError: a tensor is not of float32 on the CPU, in one piece.
    """

    def __init__(self, found: Sequence[Region]) -> None:
        steps = [step for region in found for step in region.steps]
        self.layers: list[SparseConv2d] = [layer for region in found for layer in region.layers]
        norms = [step.norm for step in steps if step.norm is not None]
        for layer in self.layers:
            layer.current()
        places = [place for module in (*self.layers, *norms) for place in (module._parameters, module._buffers)]
        self._places: list[Any] = [place for place in places if any(map(_single, place.values()))]
        self._found = self._now()
        self._weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        small = [*biases, *(tensor for norm in norms for tensor in _statistics(norm))]
        self._small_tensors = [tensor for tensor in small if tensor is not None]
        packed = [layer.packed_weight for layer in self.layers]
        self._tensors = [*self._weights, *packed, *self._small_tensors]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        counted = not any(map(Tensor.is_inference, self._weights))
        self._version: Callable[[Tensor], int | None] = operator.attrgetter("_version") if counted else version
        self._marks = self._marked()
        kept = [layer._packed_from for layer in self.layers]
        both = [(one.addresses[0], one.watches[0]) for one in kept if one is not None and one.watches]
        self._watches = [one for _, one in both]
        self._watched = pointers([at for at, _ in both]), pointers([one.address for one in self._watches])
        if not all(map(_plain, self._small_tensors)):
            raise ValueError("not float32 on the CPU, in one piece")
        self._small = [watch(tensor) for tensor in self._small_tensors]
        addresses = [tensor.data_ptr() for tensor in self._small_tensors]
        self._small_at = pointers(addresses), pointers([one.address for one in self._small])
        self._vectors = {id(step): _vectors(step) for step in steps}
        self.laid: dict[tuple[int, tuple[int, ...]], tuple[Any, _Size] | None] = {}
        self._strides: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def holds(self) -> bool:
        """Whether all tensors are where they were and hold what they held; raises a StateError if weights do not."""
        now = self._now()
        if len(now) != len(self._found) or not all(map(operator.is_, now, self._found)):
            return False
        if self._addresses != [*map(Tensor.data_ptr, self._tensors)]:
            return False
        if self._marks != self._marked() or seen_to_differ(self._small, self._small_at, all=True):
            return False
        if seen_to_differ(self._watches, self._watched):
            for layer in self.layers:  # to say which it is
                layer.require_fresh()
        return True

    def differentiable(self) -> bool:
        """Whether torch would have to record what is done with one of the tensors."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors)

    def _now(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(dict.values, self._places))]

    def _marked(self) -> list[Any]:
        laid = (*self._weights, *self._small_tensors)
        return [*map(self._version, self._weights), *map(Tensor.stride, laid), *map(Tensor.numel, laid)]

    def lay(self, region: int, steps: Sequence[Step], shape: tuple[int, ...]) -> tuple[Any, _Size] | None:
        """The native steps for an image of this shape, and the size of what comes out; None if torch has to do it."""
        key = region, shape
        if key not in self.laid:
            if len(self.laid) >= _SHAPES:
                self.laid.clear()
            self.laid[key] = self._lay(steps, shape)
        return self.laid[key]

    def strides(self, number: int, region: Region, image: Tensor) -> tuple[int, ...]:
        """Those that torch would give the result of a region: weights in another layout are bound anew."""
        key = number, image.shape, image.stride()
        found = self._strides.get(key)
        if found is None:
            if len(self._strides) >= _SHAPES:
                self._strides.clear()
            found = self._strides[key] = result_strides(region, image)
        return found

    def _lay(self, steps: Sequence[Step], shape: tuple[int, ...]) -> tuple[Any, _Size] | None:
        sizes: dict[int, _Size] = {0: (shape[1], shape[2], shape[3])}
        made = (native.Step * len(steps))()
        for step, one in zip(steps, made, strict=True):
            source, times = _factors(step, sizes)
            given = sizes[source]
            windows = _windows(step, given)
            result = _result(step, given, windows)
            if result is None or (step.add >= 0 and sizes[step.add] != result):
                return None
            if times >= 0 and sizes[times] != (given[0], 1, 1):
                return None
            sizes[step.to] = result
            one.kind, one.source, one.to, one.add, one.activation, one.times = (
                step.kind, source, step.to, step.add, step.activation, times
            )  # fmt: skip
            one.counted = step.window is not None and step.window.counted
            scale, shift = self._vectors[id(step)]
            if not readable(scale, result[0]) or not readable(shift, result[0]):
                return None
            one.scale, one.shift = _address(scale), _address(shift)
            if step.kind == CONVOLUTION:
                one.blob = step.layer.packed_weight.data_ptr()
                code = step.layer._codes.get("weight")
                pixels = products.bucket(shape[0] * result[1] * result[2])
                one.code = code.handle if code is not None and code.choices >> pixels & 1 else None
            one.shape[:] = [shape[0], *given, *(number for pair in windows for number in pair)]
        return made, sizes[steps[-1].to]


def _factors(step: Step, sizes: Mapping[int, _Size]) -> tuple[int, int]:
    """The value that a step reads, and the one by which it is multiplied, which has one pixel a channel; or -1."""
    both = step.source, step.times
    return both[::-1] if step.times >= 0 and sizes[step.source][1:] == (1, 1) else both


def _plain(tensor: Tensor) -> bool:
    there = type(tensor.data) is Tensor and tensor.dtype is torch.float32 and tensor.is_cpu
    return there and tensor.is_contiguous() and tensor.data_ptr() != 0


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _single(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() == 1 and tensor.is_floating_point()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vectors(step: Step) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a step, of its BatchNorm and the bias of its convolution."""
    bias = step.layer.bias if step.kind == CONVOLUTION else None
    norm: Any = step.norm
    with torch.inference_mode(False), torch.no_grad():
        small = [one for one in (bias, *(() if norm is None else _statistics(norm))) if one is not None]
        if not all(readable(one, small[0].numel()) for one in small):
            raise ValueError("not of one size")  # which torch refuses, or makes the most of
        if norm is None:
            return None, None if bias is None else bias.detach().contiguous()
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale if bias is None else (bias - norm.running_mean) * scale
        shift = shift if norm.bias is None else shift + norm.bias
        return scale.float().contiguous(), shift.float().contiguous()


def _windows(step: Step, image: _Size) -> tuple[tuple[int, ...], ...]:
    """Size, stride, padding and dilation of what a step looks at, each for height and width."""
    if step.kind == CONVOLUTION:
        stride, padding, _, dilation = spreading(step.layer)
        return tuple(step.layer.weight.shape[2:]), stride, padding, dilation
    if (window := step.window) is None:
        return (1, 1), (1, 1), (0, 0), (1, 1)
    return window.size or image[1:], window.stride, window.padding, window.dilation


def _result(step: Step, image: _Size, windows: tuple[tuple[int, ...], ...]) -> _Size | None:
    """The size that a step gives; None if torch would not compute it."""
    size, stride, padding, dilation = windows
    if min(*size, *stride, *dilation) < 1 or min(padding) < 0 or min(image) < 1:
        return None
    channels = image[0]
    if step.kind == CONVOLUTION:
        layer = step.layer
        if layer.groups != layer._packed_groups or channels != layer.weight.shape[1] * layer.groups:
            return None
        channels = layer.weight.shape[0]
    elif any(2 * pad > width for pad, width in zip(padding, size, strict=True)):
        return None
    height, width = products.conv_size(image[1:], size, stride, padding, dilation)
    return (channels, height, width) if min(height, width) > 0 else None


@dataclass(frozen=True)
class _Call:
    """A node that runs as it says."""

    node: fx.Node
    function: Callable[..., Any]
    spent: tuple[fx.Node, ...] = ()
    """Nodes whose values nothing needs afterwards."""

    def run(self, values: dict[fx.Node, Any], bound: Bound) -> None:
        given = values.__getitem__
        args, kwargs = [_filled(one, given) for one in self.node.args], _filled(self.node.kwargs, given)
        values[self.node] = self.function(*args, **kwargs)
        self.forget(values)

    def forget(self, values: dict[fx.Node, Any]) -> None:
        """Free what is not needed behind it."""
        for node in self.spent:
            values.pop(node, None)


@dataclass(frozen=True)
class _Run:
    """A region: one native call, or its nodes one after the other."""

    number: int
    region: Region
    singly: tuple[_Call, ...]

    def run(self, values: dict[fx.Node, Any], bound: Bound) -> None:
        out = self._at_once(values[self.region.source], bound)
        if out is None:
            for call in self.singly:
                call.run(values, bound)
            return
        for node in self.region.results:
            values[node] = out
        for call in self.singly:
            call.forget(values)

    def _at_once(self, x: Any, bound: Bound) -> Tensor | None:
        if type(x) is not Tensor or x.dim() != 4 or x.dtype is not torch.float32 or not x.is_cpu or x.is_neg():
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None  # the layers say what is wrong
        laid = bound.lay(self.number, self.region.steps, tuple(x.shape))
        out = None if laid is None else products.network(x, *laid)
        return None if out is None else strided(out, bound.strides(self.number, self.region, x))


class Program:
    """The graph of a module with its regions."""

    def __init__(self, module: nn.Module, graph: fx.Graph, found: Sequence[Region]) -> None:
        self.words, self.regions = fingerprint(graph), found
        nodes = [*graph.nodes]
        place = {node: i for i, node in enumerate(nodes)}
        spent: dict[int, list[fx.Node]] = {}
        for node in nodes[:-1]:
            spent.setdefault(max((place[user] for user in node.users), default=place[node]), []).append(node)
        calls = [_Call(node, _function(node, module), tuple(spent.get(i, ()))) for i, node in enumerate(nodes)]
        self._source, self._entries = nodes[0], [*self._merged(calls)]
        self._bound: Bound | None = None

    def _merged(self, calls: Sequence[_Call]) -> Iterator[_Call | _Run]:
        end = 1  # behind the input
        for number, region in enumerate(self.regions):
            start, behind = region.span
            yield from calls[end:start]
            yield _Run(number, region, tuple(calls[start:behind]))
            end = behind
        yield from calls[end:]

    @property
    def layers(self) -> list[SparseConv2d]:
        """The convolutions of its regions."""
        return [layer for region in self.regions for layer in region.layers]

    def bound(self) -> Bound | None:
        """The tensors as they are now, or None if these are not for the kernels; as `Bound` raises a StateError."""
        bound = self._bound
        try:
            if bound is None or not bound.holds():
                self._bound = bound = Bound(self.regions)
        except StateError:
            raise
        except (ValueError, AttributeError, RuntimeError):  # another dtype, parameters that are gone, or of torch.func
            return None
        return bound

    def release(self) -> None:
        """Take the tensors as they are at the next call."""
        self._bound = None

    def run(self, x: Tensor, bound: Bound) -> Any:
        """What the module's forward gives."""
        values: dict[fx.Node, Any] = {self._source: x}
        for entry in self._entries:
            entry.run(values, bound)
        return values.popitem()[1]


def _filled(given: Any, value: Callable[[fx.Node], Any]) -> Any:
    """Arguments with values for nodes, in lists and dicts that can be changed, as those of torch.fx cannot."""
    if isinstance(given, fx.Node):
        return value(given)
    if isinstance(given, dict):
        return {key: _filled(one, value) for key, one in given.items()}
    if isinstance(given, list):
        return [_filled(one, value) for one in given]
    if isinstance(given, slice):
        return slice(*(_filled(one, value) for one in (given.start, given.stop, given.step)))
    if isinstance(given, tuple):
        filled = (_filled(one, value) for one in given)
        return type(given)(*filled) if hasattr(given, "_fields") else tuple(filled)
    return given


def _function(node: fx.Node, module: nn.Module) -> Callable[..., Any]:
    """What a node calls with its arguments."""
    target: Any = node.target
    if node.op == "call_module":
        called = held_at(module, target)
        assert called is not None, target
        return called
    if node.op == "call_method":
        return lambda value, *args, **kwargs: getattr(value, target)(*args, **kwargs)
    if node.op == "get_attr":
        above = weakref.ref(module)  # which keeps what is made here
        return lambda: functools.reduce(getattr, target.split("."), above())
    return target if node.op == "call_function" else lambda value: value
