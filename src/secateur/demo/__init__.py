"""The built-in demo: an LSTM on handwritten digits, pruned to an exact sparsity while it trains.

Read it in this order, as a tutorial:

- `digits.py`: the data, a plain model and a plain training loop. Nothing there knows of pruning.
- `story.py`: the eight steps of the story.
- `elsewhere.py`: a script that loads the pruned model where there is no secateur.
- `pictures.py`: how the result is shown.
- `stage.py`: settings, progress bar and files, for all stories.
- `structured.py`: the same data and loop, the LSTM with half its units, beside a sparse one.
- `after_training.py`: the same data, the LSTM pruned without a loop, beside magnitude.
- `uncertainty.py`: the same data and loop, a model with dropout, and what it is unsure of.
"""

from secateur.demo.story import run

__all__ = ["run"]
