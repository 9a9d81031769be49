"""Pruning in the `Trainer` of transformers: one line, resume included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.errors import InputError, StateError
from secateur.integrations.beginning import begin, given, worth_telling
from secateur.pruner import Pruner
from secateur.support import files

PRUNER_NAME = "pruner.pt"
"""The file of a checkpoint that holds the state of the pruner."""


class PruningCallback(TrainerCallback):
    """Prunes while a `Trainer` trains: `Trainer(model, args, ..., callbacks=[PruningCallback(pruner)])`.

    It follows the optimizer that the Trainer makes, saves the pruner into each checkpoint, goes on from there
    (`resume_from_checkpoint`), and finishes the pruner when the training ends. `trainer.state.log_history` gets the
    sparsity when it has changed by a hundredth, and at its end. `load_best_model_at_end` and `EarlyStoppingCallback`
    judge only models that have their final sparsity. A schedule in fractions is of all steps of the training.

    Args:
        pruner: of the model that the Trainer trains. A Trainer takes one: for parts of the model, `{glob: sparsity}`.

    Raises:
        InputTypeError: no Pruner. StateError: a second PruningCallback in one Trainer. While it trains:
        StateError: the pruner is in the middle of another training; the schedule has not come to its end in this one.
        InputError: a checkpoint to go on from has no pruner, or that of another run; it is not in `output_dir`, and
            `TrainingArguments(resume_from_checkpoint=)` does not name it.
        MaskError: pruned weights are not zero, in a checkpoint or at the end.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = given(pruner)
        self._state = TrainerState()
        self._told = 0.0
        pruner.on_update(self._log)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _require_alone(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        _require_alone(state)
        self._state, self._told = state, 0.0
        self.pruner.over(state.max_steps)
        begin(self.pruner, _saved(_origin(args, state)) if state.global_step else None)
        self.pruner.attach(*[optimizer] * (optimizer is not None))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.pruner.done:  # what was judged so far had another sparsity
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with files.replacing(_folder(args, state) / PRUNER_NAME) as temporary:
                torch.save(self.pruner.state_dict(), temporary)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            begin(self.pruner, _saved(Path(state.best_model_checkpoint)))
        self.pruner.finish()

    def _log(self, metrics: Mapping[str, float]) -> None:
        if not worth_telling(self.pruner, self._told):
            return
        self._told = self.pruner.sparsity
        self._state.log_history.append(
            {"pruning/sparsity": metrics["pruning/sparsity"], "epoch": self._state.epoch, "step": self.pruner.steps}
        )


def _require_alone(state: TrainerState) -> None:
    """See that this is the only PruningCallback of a Trainer, which has a state for its making and for each training.

    Raises:
        StateError: it is the second.
    """
    if "pruned" in vars(state):
        raise StateError(
            "this Trainer has two PruningCallbacks, and its checkpoints room for one pruner: leave one out; to prune "
            "parts of a model apart, give one Pruner their sparsities, {glob: sparsity}"
        )
    vars(state)["pruned"] = True


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a Trainer puts its checkpoint of this step."""
    return Path(args.output_dir or "", state.trial_name or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _origin(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that a Trainer goes on from: it tells no callback, but has just loaded the state that is there.

    Raises:
        InputError: it is elsewhere.
    """
    usual = _folder(args, state)
    for folder in (Path(args.resume_from_checkpoint or usual), usual):
        path = folder / TRAINER_STATE_NAME
        if path.is_file() and _history(TrainerState.load_from_json(str(path))) == _history(state):
            return folder
    raise InputError(
        f"the training goes on from a checkpoint that is not {usual}, and a Trainer does not tell which: say it in "
        "TrainingArguments(resume_from_checkpoint=folder) as well, or move the checkpoint there; or begin anew"
    )


def _history(state: TrainerState) -> str:
    return json.dumps([state.global_step, state.epoch, state.log_history])


def _saved(folder: Path) -> Mapping[str, Any]:
    path = folder / PRUNER_NAME
    if not path.is_file():
        raise InputError(
            f"there is no {path}: a training goes on from a checkpoint that was saved with a PruningCallback; go on "
            "from another one, or begin anew"
        )
    found: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found
