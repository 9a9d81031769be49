"""Learned rates: dropout rates, weight noise and gates that training finds, and the bridge from them to pruning."""

from secateur.dropout.learned.base import LearnedRates, attached
from secateur.dropout.learned.concrete import concrete
from secateur.dropout.learned.hard_concrete import hard_concrete
from secateur.dropout.learned.to_pruning import finish, penalty, to_masks, to_scores
from secateur.dropout.learned.variational import variational

__all__ = [
    "LearnedRates",
    "attached",
    "concrete",
    "finish",
    "hard_concrete",
    "penalty",
    "to_masks",
    "to_scores",
    "variational",
]
