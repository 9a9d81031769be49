"""Inference on packed sparse weights: accelerate a model, layer by layer, where it is measured to be faster."""
