"""Callbacks for the training loops of other libraries, each in a module of its name: import the one that you use."""
