"""Inference on packed sparse weights: accelerate a model, layer by layer, where it is measured to be faster."""

from secateur.runtime.acceleration import check_weights, trust_weights

__all__ = ["check_weights", "trust_weights"]
