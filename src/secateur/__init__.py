"""Precise pruning for PyTorch: exact sparsity, the same model at every moment, honest measurements.

The verbs are here; what can be chosen for their arguments is in modules: `secateur.scores`, `secateur.allocation`,
`secateur.patterns`, `secateur.schedules`, `secateur.regrow`, `secateur.feedback`,
`secateur.distillation`, `secateur.dropout`, `secateur.errors`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from secateur.support.machine import secateur_version as _version

if TYPE_CHECKING:
    from secateur.public_names import *

__version__ = _version()

__all__ = [
    "Count",
    "Masks",
    "Pruner",
    "SecateurError",
    "accelerate",
    "accumulate",
    "blocks",
    "calibrate",
    "check",
    "choose_allocation",
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
    "oneshot",
    "pack",
    "plain_state_dict",
    "prune",
    "recalibrate",
    "recommend",
    "recover",
    "refit",
    "remask",
    "report",
    "rewind",
    "save",
    "save_pretrained",
    "scan",
    "shrink",
    "units",
    "unpack",
    "weights",
]


def __getattr__(name: str) -> Any:
    """Import a name or a module when it is first used: `secateur --help` and the shell's completion need no torch."""
    if name in __all__:
        return getattr(import_module("secateur.public_names"), name)
    if name.startswith("_") or find_spec(f"secateur.{name}") is None:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return import_module(f"secateur.{name}")


def __dir__() -> list[str]:
    return ["__all__", "__version__", *vars(import_module("secateur.public_names"))]
