"""Dropout layers that people keep rewriting, and one mask a sequence for recurrent ones."""
