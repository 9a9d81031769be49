"""Dropout rates that are learned, and what they say of the weights."""
