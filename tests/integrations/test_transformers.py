"""PruningCallback in transformers' Trainer: resume bit for bit, only final models judged, counts exact."""

import logging
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import secateur as sc
from models import k, zeros
from secateur.errors import InputError, InputTypeError, MaskError, StateError
from secateur.integrations.transformers import PRUNER_NAME, PruningCallback

STEPS = 20
EXAMPLES = [{"input_ids": [i % 7 + 1, i % 5 + 1, i % 3 + 1, 2], "labels": i % 2} for i in range(48)]


@pytest.fixture(autouse=True)
def quiet():
    """Trainer tells of each step that it takes."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


class Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt("stop")


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


def made(folder, *callbacks, seed=0, score="magnitude", schedule=sc.cubic(0.1, 0.7, every=2), **options):
    model = bert(seed)
    pruner = sc.Pruner(model, 0.9, schedule=schedule, score=score, allocation="erk")
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "steps", "save_steps": 5, **options},
    )
    every = [PruningCallback(pruner), *callbacks]
    return Trainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:8], callbacks=every), pruner


def test_one_line_prunes_and_tells(tmp_path):
    trainer, pruner = made(tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    trainer.train()
    assert pruner.steps == STEPS
    assert pruner.masks.pruned == zeros(sc.weights(trainer.model)) == k(0.9, pruner.masks.size)
    told = [
        (entry["step"], entry["pruning/sparsity"]) for entry in trainer.state.log_history if "pruning/sparsity" in entry
    ]
    assert [step for step, _ in told] == [4, 6, 8, 10, 12, 14]  # at step 2 the curve is at 0
    assert told[-1][1] == pytest.approx(0.9, abs=1e-4)
    pruner.attach(torch.optim.SGD(trainer.model.parameters(), lr=0.1))  # it was let go
    pruner.detach()


@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_a9_resume_in_the_middle_of_a_schedule_is_bit_exact(tmp_path, score):
    through, _ = made(tmp_path / "through", score=score)
    through.train()
    stopped, _ = made(tmp_path / "again", Stop(8), score=score)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped.train()
    again, pruner = made(tmp_path / "again", score=score)
    again.train(resume_from_checkpoint=True)
    assert pruner.steps == STEPS
    want = through.model.state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in again.model.state_dict().items())
    stopped.remove_callback(Stop)  # as in a notebook
    stopped.train(resume_from_checkpoint=True)
    assert all(torch.equal(weight, want[name]) for name, weight in stopped.model.state_dict().items())


def test_only_models_at_their_final_sparsity_are_judged(tmp_path):
    """By this metric the first model, which has all its weights, would be the best."""
    trainer, pruner = made(
        tmp_path,
        EarlyStoppingCallback(1),
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="sparsity_missing",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda _: {"sparsity_missing": 1 - pruner.sparsity}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-15")
    assert trainer.state.best_metric == pytest.approx(0.1, abs=1e-4)
    assert zeros(sc.weights(trainer.model)) == k(0.9, pruner.masks.size)


def test_a_checkpoint_without_a_pruner(tmp_path):
    trainer, _ = made(tmp_path, Stop(8))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        trainer.train()
    (tmp_path / "checkpoint-5" / PRUNER_NAME).unlink()
    again, pruner = made(tmp_path)
    with pytest.raises(InputError, match=r"no .*checkpoint-5.pruner\.pt.*output_dir"):
        again.train(resume_from_checkpoint=True)
    assert pruner.steps == 0


def test_a_checkpoint_of_another_run(tmp_path):
    trainer, _ = made(tmp_path, Stop(12))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        trainer.train()
    other, _ = made(tmp_path, schedule=sc.linear(0.1, 0.7))
    with pytest.raises(InputError, match="other settings: schedule"):
        other.train(resume_from_checkpoint=True)
    stranger, _ = made(tmp_path / "other", Stop(12), seed=1)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stranger.train()
    shutil.copy(tmp_path / "other" / "checkpoint-10" / PRUNER_NAME, tmp_path / "checkpoint-10")
    again, _ = made(tmp_path)
    with pytest.raises(MaskError, match=r"of another run than the weights: .* is not zero where it pruned"):
        again.train(resume_from_checkpoint=True)


def test_a_second_training(tmp_path):
    """A pruner that is done holds its masks; one in the middle of a training is no use for another."""
    trainer, pruner = made(tmp_path, save_strategy="no")
    trainer.train()
    trainer.train()
    assert zeros(sc.weights(trainer.model)) == k(0.9, pruner.masks.size)
    stopped, _ = made(tmp_path, Stop(8), save_strategy="no")
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped.train()
    with pytest.raises(StateError, match=r"in the middle of another training.*make a new Pruner"):
        stopped.train()


def test_a_schedule_that_is_longer_than_the_training(tmp_path):
    trainer, _ = made(tmp_path, save_strategy="no", schedule=sc.cubic(0, 10 * STEPS))
    with pytest.raises(StateError, match="earlier stop"):
        trainer.train()


def test_what_is_no_pruner():
    with pytest.raises(InputTypeError, match=r"pruner is a BertForSequence.*give a secateur\.Pruner"):
        PruningCallback(bert())
