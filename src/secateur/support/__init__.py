"""Helpers for all other modules; not part of the public interface."""
