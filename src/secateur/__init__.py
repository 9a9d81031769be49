"""Precise pruning for PyTorch: exact sparsity, the same model at every moment, honest measurements.

The verbs are here; the choices they take are in rooms of their own: `secateur.scores`, `secateur.allocation`,
`secateur.patterns`, `secateur.schedules`, `secateur.dropout`, `secateur.errors`.
"""

from secateur import allocation as allocation
from secateur import dropout as dropout
from secateur import errors as errors
from secateur import patterns as patterns
from secateur import schedules as schedules
from secateur import scores as scores
from secateur.errors import SecateurError
from secateur.masks import Masks, check, remask
from secateur.measurement.reports import report
from secateur.measurement.timing import compare, measure
from secateur.patterns import blocks, n_m
from secateur.pruner import Pruner, prune
from secateur.runtime.acceleration import accelerate, dense, explain
from secateur.schedules import cubic, geometric, linear
from secateur.scope import weights
from secateur.scores import accumulate
from secateur.sparsity import Count
from secateur.storage import load, load_pretrained, pack, save, save_pretrained, unpack
from secateur.support.machine import secateur_version as _version
from secateur.torch_prune import from_torch_prune, plain_state_dict

__version__ = _version()

__all__ = [
    "Count",
    "Masks",
    "Pruner",
    "SecateurError",
    "accelerate",
    "accumulate",
    "blocks",
    "check",
    "compare",
    "cubic",
    "dense",
    "dropout",
    "explain",
    "from_torch_prune",
    "geometric",
    "linear",
    "load",
    "load_pretrained",
    "measure",
    "n_m",
    "pack",
    "plain_state_dict",
    "prune",
    "remask",
    "report",
    "save",
    "save_pretrained",
    "unpack",
    "weights",
]
