"""Dropout, pruning's stochastic cousin: uncertainty, the layers people keep rewriting, and rates that are learned."""
