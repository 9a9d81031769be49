"""The layers that read units, as matrices: which columns of them belong to which unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur import anatomy
from secateur.anatomy import Layout
from secateur.calibration.moments import Moments
from secateur.calibration.solvers.curvature import DAMPING
from secateur.calibration.statistics import Statistics
from secateur.structure.cut import named_tensors


class Readers:
    """The weights of a model of whose inputs second moments are known.

    Attributes:
        tensors: the weights, by name.
        layouts: where their outputs and inputs stand.
    """

    def __init__(self, model: nn.Module, stats: Statistics) -> None:
        named = named_tensors(model)
        self._stats = stats
        self.tensors = {name: named[name] for one in stats.moments for name in one.names}
        self.layouts = {name: layout(model, name, tensor) for name, tensor in self.tensors.items()}

    def __iter__(self) -> Iterator[Moments]:
        return iter(self._stats.moments)

    def matrix(self, moments: Moments) -> Tensor:
        """The weights, float64 [groups, rows, inputs]; a copy, where the sums are."""
        outputs_first = {name: self.layouts[name].outputs_first(self.tensors[name].detach()) for name in moments.names}
        return moments.matrix(outputs_first).to(moments.gram)

    def columns(self, moments: Moments, along: Mapping[tuple[str, int], Tensor], otherwise: Tensor) -> Tensor:
        """What is known of each column, [groups, inputs].

        Args:
            moments: of the matrix.
            along: by name and stored dimension, something for each position along it: labels, whether it stays. Where
                two dimensions of a weight are known, the larger of both counts.
            otherwise: where nothing is known.
        """
        parts = []
        for name, start, stop in moments.pieces:
            shape = self.tensors[name].shape
            known = otherwise.expand(shape)
            for d in input_dims(self.layouts[name]):
                if (name, d) in along:
                    line = along[name, d].view([-1 if k == d else 1 for k in range(len(shape))])
                    known = torch.maximum(known, line.expand(shape))
            rows = self.layouts[name].outputs_first(known)[start:stop]
            parts.append(rows[:: len(rows) // moments.groups].flatten(1))  # all rows of a group are alike
        return torch.cat(parts, 1)


def layout(model: nn.Module, name: str, tensor: Tensor) -> Layout:
    """Where the outputs and the inputs of a tensor of a model stand."""
    path, _, attribute = name.rpartition(".")
    return anatomy.layout(model.get_submodule(path), attribute, tensor)


def input_dims(layout: Layout) -> list[int]:
    """The stored dimensions of a weight along which its inputs lie."""
    letters = [*layout.dims]
    if layout.groups:
        letters[:2] = ["".join(letters[:2])]  # inputs of all groups, one after another
    return [d for d, letter in enumerate(letters) if "i" in letter]


def damped(gram: Tensor) -> Tensor:
    """A Gram matrix [n, n] with a part of its mean diagonal added to the diagonal; where no input ever came, ones."""
    mean = float(gram.diagonal().mean())
    return gram + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
