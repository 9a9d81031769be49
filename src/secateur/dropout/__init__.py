"""Dropout, pruning's stochastic cousin: uncertainty, the layers people keep rewriting, and rates that are learned."""

from secateur.dropout import metrics as metrics
from secateur.dropout.layers import (
    DropBlock2d,
    DropConnect,
    LockedDropout,
    StochasticDepth,
    TargetedDropout,
    WordDropout,
)
from secateur.dropout.learned import concrete, finish, hard_concrete, penalty, to_masks, to_scores, variational
from secateur.dropout.moments import closed_form
from secateur.dropout.sampling import sample
from secateur.dropout.search import find
from secateur.dropout.sequences import RecurrentDropout, recurrent
from secateur.dropout.uncertainty import Prediction

__all__ = [
    "DropBlock2d",
    "DropConnect",
    "LockedDropout",
    "Prediction",
    "RecurrentDropout",
    "StochasticDepth",
    "TargetedDropout",
    "WordDropout",
    "closed_form",
    "concrete",
    "find",
    "finish",
    "hard_concrete",
    "metrics",
    "penalty",
    "recurrent",
    "sample",
    "to_masks",
    "to_scores",
    "variational",
]
