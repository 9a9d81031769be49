"""Precise pruning for PyTorch: exact sparsity, the same model at every moment, honest measurements."""

from secateur import allocation, errors, patterns, schedules, scores
from secateur.allocation import Count
from secateur.errors import SecateurError, SecateurWarning
from secateur.masks import Masks, check, remask
from secateur.patterns import blocks, n_m
from secateur.pruner import Pruner, prune
from secateur.reports import report
from secateur.schedules import cubic, geometric, linear, one_shot
from secateur.scope import weights
from secateur.scores import accumulate

__all__ = [
    "Count",
    "Masks",
    "Pruner",
    "SecateurError",
    "SecateurWarning",
    "accumulate",
    "allocation",
    "blocks",
    "check",
    "cubic",
    "errors",
    "geometric",
    "linear",
    "n_m",
    "one_shot",
    "patterns",
    "prune",
    "remask",
    "report",
    "schedules",
    "scores",
    "weights",
]
