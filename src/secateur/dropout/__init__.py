"""Dropout, pruning's stochastic cousin: uncertainty, the layers people keep rewriting, and rates that are learned."""

from secateur.dropout.interception.discovery import find
from secateur.dropout.layers.modules import (
    DropBlock2d,
    DropConnect,
    LockedDropout,
    StochasticDepth,
    TargetedDropout,
    WordDropout,
)
from secateur.dropout.layers.recurrent import RecurrentDropout, recurrent
from secateur.dropout.learned import concrete, finish, hard_concrete, penalty, to_masks, to_scores, variational
from secateur.dropout.sampling.closed_form import closed_form
from secateur.dropout.sampling.monte_carlo import sample
from secateur.dropout.uncertainty import metrics as metrics
from secateur.dropout.uncertainty.predictions import Prediction

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
