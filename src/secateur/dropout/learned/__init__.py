"""Learned rates: dropout rates, weight noise and gates that training finds, and the bridge from them to pruning."""

from secateur.dropout.learned.bridge import finish, penalty, to_masks, to_scores
from secateur.dropout.learned.gates import hard_concrete
from secateur.dropout.learned.layer_rates import concrete
from secateur.dropout.learned.rates import LearnedRates, attached
from secateur.dropout.learned.weight_rates import variational

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
