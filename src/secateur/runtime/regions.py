"""Regions of a graph that one native call can compute: which they are, and their steps.

A region is a slice of a graph's nodes, in the order in which these run. One value goes in, one that is used comes out,
and between are convolutions with packed weights, two or more, and what may stand between these.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from secateur.runtime.activations import NONE
from secateur.runtime.convolutions import SparseConv2d
from secateur.runtime.operations import (
    ADDITION,
    CONVOLUTION,
    NEITHER,
    NORM,
    PRODUCT,
    SAME,
    Operation,
    Pair,
    Window,
    read,
)

__all__: list[str] = []  # reached through secateur.accelerate alone


@dataclass
class Step:
    """`to` = activation(norm(what its kind makes of `source`) * times + add); value 0 is what goes into the region."""

    kind: int
    source: int
    to: int
    layer: Any = None
    window: Window | None = None
    norm: nn.BatchNorm2d | None = None
    add: int = -1
    activation: int = NONE
    times: int = -1


@dataclass(frozen=True)
class Region:
    """A slice of a graph's nodes and what computes it.

    Attributes:
        span: its first node, and the one behind its last.
        source: the node whose value goes in.
        results: nodes that stand for the value of the last step, and are used behind it.
        steps: step i writes value i + 1.
        operations: the nodes, and what each does.
    """

    span: Pair
    source: fx.Node
    results: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    operations: tuple[tuple[fx.Node, Operation], ...]

    @property
    def layers(self) -> list[SparseConv2d]:
        """Its convolutions."""
        return [step.layer for step in self.steps if step.kind == CONVOLUTION]


def regions(graph: fx.Graph, module: nn.Module) -> Iterator[Region]:
    """The regions of the graph of a module: from its beginning on, each as long as can be."""
    nodes = [*graph.nodes]
    place = {node: i for i, node in enumerate(nodes)}
    last = [max((place[user] for user in node.users), default=-1) for node in nodes]
    operations = [read(node, module) for node in nodes]
    start = 0
    while start < len(nodes):
        found = _longest(nodes, operations, last, start)
        if found is not None:
            yield found
        start = start + 1 if found is None else found.span[1]


def _longest(
    nodes: Sequence[fx.Node], operations: Sequence[Operation | None], last: Sequence[int], start: int
) -> Region | None:
    draft, end = _Draft(), start
    for i in range(start, len(nodes)):
        operation = operations[i]
        if operation is None or not draft.take(nodes[i], operation):
            break
        if draft.closed(nodes[start : i + 1], last[start : i + 1], i + 1):
            end = i + 1
    draft = _Draft()
    pairs = zip(nodes[start:end], operations[start:end], strict=True)
    taken = tuple((node, operation) for node, operation in pairs if operation is not None)
    for node, operation in taken:
        draft.take(node, operation)
    results = tuple(nodes[i] for i in range(start, end) if last[i] >= end)
    steps = draft.steps()
    if draft.source is None or steps[-1].to != draft.count:
        return None
    return Region((start, end), draft.source, results, _numbered(steps), taken)


class _Draft:
    """Operations on numbered values; a node that changes a tensor in place makes a new value of all its names."""

    def __init__(self) -> None:
        self.source: fx.Node | None = None
        self.count = 0
        self._values: dict[fx.Node, int] = {}
        self._pixels: set[int] = set()  # values that are seen to have one pixel a channel
        self._done: list[tuple[Operation, list[int], int]] = []

    def take(self, node: fx.Node, operation: Operation) -> bool:
        """Add a node, unless a second value would come in, or what comes in would be changed in place."""
        outer = {value for value in operation.values if value not in self._values}
        if outer:
            if self.source is not None or len(outer) > 1:
                return False
            self.source = outer.pop()
            self._values[self.source] = 0
        read = [self._values[value] for value in operation.values]
        if operation.in_place and read[0] == 0:
            return False
        if operation.kind == SAME:
            self._values[node] = read[0]
            return True
        ones = [value in self._pixels for value in read]
        if operation.kind == PRODUCT and not any(ones):  # of two images, which no step multiplies
            return False
        self.count += 1
        if _of_one_pixel(operation, all(ones)):
            self._pixels.add(self.count)
        self._done.append((operation, read, self.count))
        self._values[node] = self.count
        if operation.in_place:
            self._values.update({name: self.count for name, value in self._values.items() if value == read[0]})
        return True

    def closed(self, nodes: Sequence[fx.Node], last: Sequence[int], end: int) -> bool:
        """Whether the value of the last operation is the one that is used behind, after two convolutions."""
        used = {self._values[node] for node, at in zip(nodes, last, strict=True) if at >= end}
        many = sum(operation.kind == CONVOLUTION for operation, *_ in self._done) > 1
        return many and used == {self.count}

    def steps(self) -> list[Step]:
        """Steps that do the same: norms, additions and activations are done where what they need was computed."""
        readers = collections.Counter(value for _, read, _ in self._done for value in read)
        steps: list[Step] = []
        writer: dict[int, int] = {}

        def open_step(value: int) -> Step | None:
            """The step that wrote a value for one reader alone, and has no activation yet."""
            found = steps[writer[value]] if value in writer and readers[value] == 1 else None
            return None if found is None or found.activation else found

        for operation, values, to in self._done:
            step = _into(operation, values, open_step, lambda value, step: writer.get(value, -1) < writer[step.to])
            if step is None:
                writer[to] = len(steps)
                steps.append(_alone(operation, values, to))
            else:
                writer[to] = writer[step.to]
                step.to = to
        return steps


def _of_one_pixel(operation: Operation, given: bool) -> bool:
    """Whether an operation gives one pixel a channel, if it does or does not get that."""
    if operation.kind == CONVOLUTION:
        return given and operation.layer.weight.shape[2:] == (1, 1) and operation.layer.padding == (0, 0)
    window = operation.window
    return given if window is None else window.size is None


def _into(
    operation: Operation,
    read: list[int],
    open_step: Callable[[int], Step | None],
    before: Callable[[int, Step], bool],
) -> Step | None:
    """The step that an operation became a part of, if it could."""
    if operation.kind == ADDITION:
        for one, other in (read, read[::-1]):
            if (step := open_step(one)) is not None and step.add < 0 and before(other, step):
                step.add = other
                return step
        return None
    step = open_step(read[0])
    if operation.kind == PRODUCT:
        return None
    if operation.kind == NORM and step is not None and step.norm is None and max(step.add, step.times) < 0:
        step.norm = operation.layer
        return step
    if operation.kind == NEITHER and step is not None:
        step.activation = operation.activation
        return step
    return None


def _alone(operation: Operation, read: list[int], to: int) -> Step:
    if operation.kind == NORM:
        return Step(NEITHER, read[0], to, norm=operation.layer)
    if operation.kind == ADDITION:
        return Step(NEITHER, read[0], to, add=read[1])
    if operation.kind == PRODUCT:
        return Step(NEITHER, read[0], to, times=read[1])
    return Step(operation.kind, read[0], to, operation.layer, operation.window, activation=operation.activation)


def _numbered(steps: Sequence[Step]) -> tuple[Step, ...]:
    number = {0: 0, -1: -1, **{step.to: i + 1 for i, step in enumerate(steps)}}
    for step in steps:
        step.source, step.add, step.to = number[step.source], number[step.add], number[step.to]
        step.times = number[step.times]
    return tuple(steps)
