"""Pruning in the `Trainer` of Lightning: one line, resume included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from secateur.integrations.beginning import begin, given
from secateur.masks import remask
from secateur.pruner import Pruner


class PruningCallback(Callback):  # type: ignore[misc]
    """Prunes while a Lightning `Trainer` trains: `Trainer(..., callbacks=[PruningCallback(pruner)])`.

    It follows the optimizers of the module, automatic or manual, logs the sparsity at each change of the masks, is
    saved in each checkpoint, and goes on from there (`ckpt_path`). It finishes the pruner last: averages of the weights
    that were swapped in (`WeightAveraging`, `StochasticWeightAveraging`) get their zeros. `ModelCheckpoint` and
    `EarlyStopping` judge only models that have their final sparsity. A schedule in fractions is of all steps of the
    training.

    Args:
        pruner: of the LightningModule, or of a module in it. A Trainer takes one: for parts of the model,
            `{glob: sparsity}`.

    Raises:
        InputTypeError: no Pruner. While it trains:
        StateError: the pruner is in the middle of another training; the schedule has not come to its end in this one.
        InputError: a schedule in fractions, and a Trainer that does not know its length; a checkpoint to go on from has
            no pruner, or that of another run.
        MaskError: pruned weights are not zero, in a checkpoint or at the end.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = given(pruner)
        self._saved: Mapping[str, Any] | None = None
        self._loggers: list[Any] = []
        self._averaged = False  # a callback puts an average in place of the weights
        pruner.on_update(self._log)

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict  # taken up when the length of the training is known

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loggers = trainer.loggers
        self._averaged = any(isinstance(one, WeightAveraging | StochasticWeightAveraging) for one in trainer.callbacks)
        total = trainer.estimated_stepping_batches
        if 0 < total < math.inf:
            self.pruner.over(int(total))
        saved, self._saved = self._saved, None
        begin(self.pruner, saved)
        self.pruner.attach(*trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._remask()
        if not self.pruner.done:
            _forget_best(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0:
            self._remask()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remask()
        self._averaged = False
        if trainer.fast_dev_run:
            self.pruner.detach()
        else:
            self.pruner.finish()

    def _remask(self) -> None:
        """Set the zeros of an average that was put in place of the weights."""
        if self._averaged:
            remask(self.pruner.model, self.pruner.masks)

    def _log(self, metrics: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step=self.pruner.steps)


def _forget_best(trainer: Trainer) -> None:
    """Let any later model be better than those judged so far, which had another sparsity."""
    for one in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
        worst = torch.tensor(math.inf if one.mode == "min" else -math.inf)
        if isinstance(one, EarlyStopping):
            one.best_score, one.wait_count = worst, 0
        elif isinstance(one, ModelCheckpoint) and one.best_model_score is not None:
            one.best_k_models = dict.fromkeys(one.best_k_models, worst)
            one.kth_value = one.best_model_score = worst
