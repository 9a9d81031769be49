"""Pruning in the `Trainer` of Lightning: one line, resume included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from secateur.errors import InputError
from secateur.integrations.beginning import begin, given, worth_telling
from secateur.pruner import Pruner


class PruningCallback(Callback):  # type: ignore[misc]
    """Prunes while a Lightning `Trainer` trains: `Trainer(..., callbacks=[PruningCallback(pruner)])`.

    It follows the optimizers of the module, automatic or manual, is saved in each checkpoint, goes on from there
    (`ckpt_path`), and finishes the pruner last. The loggers get the sparsity when it has changed by a hundredth, and at
    its end. Averages of the weights (`WeightAveraging`, `StochasticWeightAveraging`) go on as they are, but have the
    zeros wherever they are seen: in validation, in checkpoints, and at the end. `ModelCheckpoint` and `EarlyStopping`
    judge only models that have their final sparsity. A schedule in fractions is of all steps of the training.

    Args:
        pruner: of the LightningModule, or of a module in it. A Trainer takes one: for parts of the model,
            `{glob: sparsity}`.

    Raises:
        InputTypeError: no Pruner. While it trains:
        StateError: the pruner is in the middle of another training; the schedule has not come to its end in this one.
        InputError: a schedule in fractions, and a Trainer that does not know its length; a checkpoint to go on from has
            no pruner, or that of another run; averages of a model that is not the pruner's.
        MaskError: pruned weights are not zero, in a checkpoint or at the end.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = given(pruner)
        self._saved: Mapping[str, Any] | None = None
        self._loggers: list[Any] = []
        self._told = 0.0
        self._averages: list[nn.Module] = []
        """In each average of the model the part that is pruned."""
        self._unmasked: list[dict[str, Tensor]] = []
        """The averages as they are trained, while they are validated with zeros."""
        self._hooks: list[RemovableHandle] = []
        pruner.on_update(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {**self.pruner.state_dict(), "averages": self._copies()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict  # taken up when the length of the training is known

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loggers, self._told = trainer.loggers, 0.0
        self._follow_averages(trainer, pl_module)
        total = trainer.estimated_stepping_batches
        if 0 < total < math.inf:
            self.pruner.over(int(total))
        saved, self._saved = self._saved, None
        begin(self.pruner, saved)
        self._bring_back(saved.get("averages", []) if saved is not None else [])
        self.pruner.attach(*trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self._averages:  # StochasticWeightAveraging puts its average there for its last epoch
            self.pruner.masks.apply(self.pruner.model)
        if not self.pruner.done:
            _forget_best(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unmasked = self._copies()
        for average in self._averages:
            self.pruner.masks.apply(average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bring_back(self._unmasked)
        self._unmasked = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for model in (self.pruner.model, *self._averages) if self._averages else ():  # whichever is seen from here on
            self.pruner.masks.apply(model)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_averages_go()
        if trainer.fast_dev_run:
            self.pruner.detach()
        else:
            self.pruner.finish()

    def _follow_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the averages of the model that other callbacks make, and let checkpoints show them with zeros."""
        self._let_averages_go()
        found = [one for one in trainer.callbacks if isinstance(one, WeightAveraging | StochasticWeightAveraging)]
        if not found:
            return
        places = [name for name, module in pl_module.named_modules() if module is self.pruner.model]
        if not places:
            raise InputError(
                "the pruner is of a model that is not in this LightningModule, whose averages need its zeros: give a "
                "Pruner of the LightningModule, or of a module in it"
            )
        for one in found:
            whole = one._average_model
            self._averages.append(_plain(whole).get_submodule(places[0]))
            start = "module." * isinstance(whole, AveragedModel) + places[0] + "." * bool(places[0])
            self._hooks.append(whole.register_state_dict_post_hook(partial(self._mask_state, start)))

    def _mask_state(self, start: str, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        """Give what an average tells of itself the zeros; the average stays."""
        keys = {name: f"{prefix}{start}{name}" for name in self.pruner.masks}
        shown = {name: state[key].detach().clone() for name, key in keys.items()}
        self.pruner.masks.apply(shown)
        state.update({keys[name]: tensor for name, tensor in shown.items()})

    def _let_averages_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._averages, self._hooks = [], []

    def _copies(self) -> list[dict[str, Tensor]]:
        """The averages as they are trained."""
        found = [self.pruner.masks.match(average) for average in self._averages]
        return [{name: weight.detach().clone() for name, weight in one.items()} for one in found]

    @torch.no_grad()
    def _bring_back(self, copies: Sequence[Mapping[str, Tensor]]) -> None:
        for average, copy in zip(self._averages, copies, strict=False):
            for name, weight in self.pruner.masks.match(average).items():
                weight.copy_(copy[name])

    def _log(self, metrics: Mapping[str, float]) -> None:
        if not worth_telling(self.pruner, self._told):
            return
        self._told = self.pruner.sparsity
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step=self.pruner.steps)


def _plain(average: nn.Module) -> nn.Module:
    """The model that is averaged, in its wrapper or not."""
    return average.module if isinstance(average, AveragedModel) else average


def _forget_best(trainer: Trainer) -> None:
    """Let any later model be better than those judged so far, which had another sparsity."""
    for one in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
        worst = torch.tensor(math.inf if one.mode == "min" else -math.inf)
        if isinstance(one, EarlyStopping):
            one.best_score, one.wait_count = worst, 0
        elif isinstance(one, ModelCheckpoint) and one.best_model_score is not None:
            one.best_k_models = dict.fromkeys(one.best_k_models, worst)
            one.kth_value = one.best_model_score = worst
