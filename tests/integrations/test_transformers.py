"""PruningCallback in transformers' Trainer: resume bit for bit, only final models judged, counts exact."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import secateur as sc
from models import copies, k, zeros
from models import same as same_tensors
from secateur.errors import InputError, InputTypeError, MaskError, SecateurWarning, StateError
from secateur.integrations.transformers import PRUNER_NAME, PruningCallback
from tiny import mostly_slow

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


CUBIC = sc.cubic(0.1, 0.7, every=2)
MOVES = {"score": "random", "schedule": "one_shot", "regrow": sc.regrow.rigl(every=3, stop=0.75)}
LIFTS = {"schedule": sc.schedules.ac_dc(0.1, 0.7, every=4)}
METHODS = {
    "movement": {"score": "movement"},
    "rigl": MOVES,
    "set": MOVES | {"regrow": sc.regrow.set_(every=3, stop=0.75)},
    "ac_dc": LIFTS,
    "dpf": {"regrow": sc.feedback.dpf(every=4)},
    "sr_ste": {"pattern": "2:4", "regrow": "sr_ste", "schedule": "one_shot"},
    "soft_movement": {"regrow": "soft_movement"},
    "str": {"regrow": "str", "allocation": "global"},
}


def made(folder, *callbacks, seed=0, pruning=None, skip=(), **options):
    model = bert(seed)
    pruning = {"schedule": CUBIC, "allocation": "erk", **(pruning or {})}
    sparsity = 0.5 if "pattern" in pruning else 0.9
    pruner = sc.Pruner(model, sparsity, scope=sc.weights(model, skip=skip), **pruning)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": 4,
            "logging_strategy": "no",
            "save_strategy": "steps",
            "save_steps": 5,
            **options,
        },
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


@pytest.mark.parametrize("pruning", mostly_slow(METHODS, "ac_dc", "rigl", "dpf"))
def test_a9_resume_in_the_middle_of_a_schedule_is_bit_exact(tmp_path, pruning):
    """AC/DC is stopped where its masks are lifted."""
    through, want_pruner = made(tmp_path / "through", pruning=pruning)
    through.train()
    stopped, pruner = made(tmp_path / "again", Stop(8), pruning=pruning, save_steps=7)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped.train()
    assert pruning is not LIFTS or pruner.sparsity == 0
    again, pruner = made(tmp_path / "again", pruning=pruning, save_steps=7)
    again.train(resume_from_checkpoint=True)
    assert pruner.steps == STEPS
    assert pruner.masks == want_pruner.masks
    assert pruner.masks.pruned == k(0.5 if "pattern" in pruning else 0.9, pruner.masks.size)
    assert sc.check(again.model, pruner.masks) == {}
    assert pruner.metrics() == want_pruner.metrics()  # what grew before the stop counts too
    want = through.model.state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in again.model.state_dict().items())
    stopped.remove_callback(Stop)  # as in a notebook
    stopped.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-7"))
    assert all(torch.equal(weight, want[name]) for name, weight in stopped.model.state_dict().items())


def test_resume_from_a_folder_elsewhere_while_gradients_add_up(tmp_path):
    """The Trainer tells no callback where it goes on from: only a folder whose history it has is believed."""
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5}  # ends of epochs are cut short
    through, _ = made(tmp_path / "through", **options)
    through.train()
    stopped, _ = made(tmp_path / "first", Stop(8), **options)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped.train()
    other, _ = made(tmp_path / "again", Stop(8), **options, logging_steps=1, logging_strategy="steps")
    with pytest.raises(KeyboardInterrupt, match="stop"):
        other.train()
    elsewhere = str((tmp_path / "first" / "checkpoint-5").rename(tmp_path / "moved"))
    lost, _ = made(tmp_path / "again", **options)
    with pytest.raises(InputError, match=r"is not .*again.checkpoint-5.*TrainingArguments\(resume_from_checkpoint="):
        lost.train(resume_from_checkpoint=elsewhere)
    again, pruner = made(tmp_path / "again", resume_from_checkpoint=elsewhere, **options)
    again.train(resume_from_checkpoint=elsewhere)
    assert pruner.steps == STEPS
    want = through.model.state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in again.model.state_dict().items())


def test_cycles_of_the_learning_rate_go_on_after_a_resume(tmp_path):
    """The step after a change of the masks is the first with the whole rate."""
    schedule = sc.schedules.gmp_star(0.1, 0.7, every=4)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append((state.global_step, optimizer.param_groups[0]["lr"]))

    def with_cycles(folder, *callbacks):
        trainer, pruner = made(folder, Watch(), *callbacks, pruning={"schedule": schedule})
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.01)
        factor = sc.schedules.cycles(schedule, STEPS)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, factor)
        return trainer, pruner

    through, _ = with_cycles(tmp_path / "through")
    through.train()
    assert [step for step, rate in seen if rate == 0.01] == [0, 2, 6, 10, 14]
    whole = dict(seen)
    seen.clear()
    stopped, _ = with_cycles(tmp_path / "again", Stop(8))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped.train()
    again, _ = with_cycles(tmp_path / "again")
    again.train(resume_from_checkpoint=True)
    assert dict(seen) == whole
    want = through.model.state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in again.model.state_dict().items())


@pytest.mark.parametrize("pruning", [{}, METHODS["soft_movement"]], ids=["magnitude", "soft_movement"])
def test_only_models_at_their_final_sparsity_are_judged(tmp_path, pruning):
    """By this metric the first model, which has all its weights, would be the best."""
    trainer, pruner = made(
        tmp_path,
        EarlyStoppingCallback(1),
        pruning=pruning,
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
    told = [entry["pruning/sparsity"] for entry in trainer.state.log_history if "pruning/sparsity" in entry]
    assert told[-1] == pytest.approx(0.9, abs=1e-4)
    assert len(told) <= 7  # though the masks of soft movement change at each step


def test_a_checkpoint_without_a_pruner(tmp_path):
    trainer, _ = made(tmp_path, Stop(8))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        trainer.train()
    (tmp_path / "checkpoint-5" / PRUNER_NAME).unlink()
    again, pruner = made(tmp_path)
    with pytest.raises(InputError, match=r"no .*checkpoint-5.pruner\.pt.*saved with a PruningCallback"):
        again.train(resume_from_checkpoint=True)
    assert pruner.steps == 0


def test_a_checkpoint_of_another_run(tmp_path):
    trainer, _ = made(tmp_path, Stop(12))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        trainer.train()
    for changed, said in (
        ({"pruning": {"schedule": sc.linear(0.1, 0.7)}}, "other settings: schedule.*build this one with the same"),
        ({"pruning": {"allocation": "uniform"}}, "other settings: allocation.*build this one with the same"),
        ({"pruning": MOVES}, "other settings: score.*build this one with the same"),
        ({"skip": "classifier"}, r"another scope \(classifier\.weight\).*the scope it had"),
    ):
        other, pruner = made(tmp_path, **changed)
        masks = pruner.masks
        with pytest.raises(InputError, match=said):
            other.train(resume_from_checkpoint=True)
        assert (pruner.steps, pruner.masks) == (0, masks)
        loaded = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
        assert all(torch.equal(weight, loaded[name]) for name, weight in other.model.state_dict().items())
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


@pytest.mark.parametrize("same", [True, False])
def test_a_callback_used_twice(tmp_path, same):
    """Their states would be one file."""
    trainer, pruner = made(tmp_path, save_strategy="no")
    before = copies(trainer.model)
    first = next(one for one in trainer.callback_handler.callbacks if isinstance(one, PruningCallback))
    again = first if same else PruningCallback(pruner)
    message = r"two PruningCallbacks.*leave one out.*\{glob: sparsity\}"
    with pytest.raises(StateError, match=message):
        Trainer(trainer.model, trainer.args, callbacks=[again, PruningCallback(pruner)])
    trainer.add_callback(again)
    with pytest.raises(StateError, match=message):
        trainer.train()
    pruner.detach()
    assert same_tensors(copies(trainer.model), before)


def test_one_callback_in_two_trainers(tmp_path):
    trainer, pruner = made(tmp_path, save_strategy="no")
    callback = trainer.pop_callback(PruningCallback)
    for trained in (trainer, Trainer(trainer.model, trainer.args, train_dataset=EXAMPLES)):
        trained.add_callback(callback)
        trained.train()
    assert pruner.steps == 2 * STEPS
    assert zeros(sc.weights(trainer.model)) == k(0.9, pruner.masks.size)


def test_an_optimizer_that_is_built_later(tmp_path):
    """Some set-ups make it after the training has begun: then each optimizer that steps these weights is followed."""

    class Late(Trainer):
        def create_optimizer(self, *_):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            return self.optimizer

    trainer, pruner = made(tmp_path, save_strategy="no")
    callback = trainer.pop_callback(PruningCallback)
    late = Late(trainer.model, trainer.args, train_dataset=EXAMPLES, callbacks=[callback])
    late.train()
    assert zeros(sc.weights(trainer.model)) == k(0.9, pruner.masks.size)

    model = bert()
    pruner = sc.Pruner(model, 0.9, schedule=CUBIC)
    callback, state = PruningCallback(pruner), TrainerState(max_steps=STEPS)
    callback.on_train_begin(trainer.args, state, TrainerControl(), optimizer=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    callback.on_train_end(trainer.args, state, TrainerControl())
    assert zeros(sc.weights(model)) == k(0.9, pruner.masks.size)


def test_a_nan_loss_where_the_masks_were_to_change(tmp_path):
    """All weights become NaN by it: the masks stay, a warning says why, and the end is not reached in silence."""
    trainer, pruner = made(tmp_path, save_strategy="no", max_grad_norm=0.0)
    step, kept = trainer.compute_loss, []

    def spoiled(*args, **options):
        kept.append(pruner.masks)
        return step(*args, **options) * (float("nan") if len(kept) == 8 else 1)

    trainer.compute_loss = spoiled
    with (
        pytest.warns(SecateurWarning, match=r"masks were to change at step 8, and stay as they are: .* holds .* NaN"),
        pytest.raises(StateError, match=r"schedule .* has not come to its end.*go on training"),
    ):
        trainer.train()
    assert pruner.masks == kept[7]
    assert 0 < pruner.sparsity < 0.9


def test_a_training_of_unknown_length(tmp_path):
    """transformers itself asks for it, before the model is touched."""
    trainer, pruner = made(tmp_path, save_strategy="no")
    before = copies(trainer.model)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True)
    stream = (example for example in EXAMPLES)
    endless = type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: stream})()
    with pytest.raises(ValueError, match="max_steps"):
        Trainer(trainer.model, arguments, train_dataset=endless, callbacks=[PruningCallback(pruner)]).train()
    assert same_tensors(copies(trainer.model), before)


def test_a_schedule_that_is_longer_than_the_training(tmp_path):
    trainer, _ = made(tmp_path, save_strategy="no", pruning={"schedule": sc.cubic(0, 10 * STEPS)})
    with pytest.raises(StateError, match="earlier stop"):
        trainer.train()


def test_what_is_no_pruner():
    with pytest.raises(InputTypeError, match=r"pruner is a BertForSequence.*give a secateur\.Pruner"):
        PruningCallback(bert())
