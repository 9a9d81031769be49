"""What the solvers need to know of a Gram matrix; what is dear is computed once for all layers that share it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NotFiniteError

DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal: Frantar & Alistarh 2023, "SparseGPT", section 4."""

OWN_DAMPING = 1e-4
"""Of each input's own diagonal, added to it: two loud inputs that say the same leave float32 something to divide by."""

_ROWS = 64
"""Of the matrix, scaled at a time: a second one in float64 would be the largest tensor of all."""


class Curvature:
    """A damped Gram matrix, scaled to unit diagonal; weights are scaled by the inverse, so that nothing changes.

    Args:
        gram: [groups, n, n] float64, sums of x x^T.

    Raises:
        NotFiniteError: the matrix holds NaN or inf; whoever knows the layer names it.

    Attributes:
        dead: [groups, 1, n] bool: inputs that were zero in every sample.
        scale: [groups, 1, n] float32: scaled weights are the weights times this.
        matrix: [groups, n, n] float32, positive definite.
    """

    def __init__(self, gram: Tensor) -> None:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        if not bool(diagonal.isfinite().all() and gram.sum().isfinite()):
            raise NotFiniteError("the second moments hold NaN or inf: look for these in the batches")
        self.dead = (diagonal == 0).unsqueeze(1)
        damped = (1 + OWN_DAMPING) * diagonal + DAMPING * diagonal.mean(-1, keepdim=True)
        damped = damped.where(damped > 0, 1.0)  # no input at all ever came
        root = damped.sqrt()
        self.scale = root.unsqueeze(1).float()
        self.matrix = torch.empty_like(gram, dtype=torch.float32)
        for new, rows, own in zip(*(torch.split(one, _ROWS, 1) for one in (self.matrix, gram, root)), strict=True):
            new.copy_(rows / own.unsqueeze(-1) / root.unsqueeze(-2))
        self.matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
