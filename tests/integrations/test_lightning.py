"""PruningCallback in Lightning's Trainer: resume, averages, several optimizers, only final models judged."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from models import copies, k, same, zeros
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError
from secateur.integrations.lightning import PruningCallback
from tiny import mostly_slow

EPOCHS, BATCHES = 5, 8

pytestmark = [  # Lightning gives advice
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


def batches():
    """All alike: a loader without a state begins its epoch anew where a training is resumed."""
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).repeat(BATCHES, 1)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        self.seen = []

    def training_step(self, batch, at):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, at):
        self.seen.append(zeros(sc.weights(self)) / sum(w.numel() for w in sc.weights(self).values()))
        self.log("left", 1 - self.seen[-1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, at):
        loss = super().training_step(batch, at)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[1:].parameters(), lr=1e-2)]


CUBIC = sc.cubic(0.1, 0.6, every=3)
MOVES = {"score": "random", "allocation": "erk", "schedule": "one_shot", "regrow": sc.regrow.rigl(every=5, stop=0.75)}
LIFTS = {"allocation": "erk", "schedule": sc.schedules.ac_dc(0.1, 0.6, every=5)}
METHODS = {
    "": {},
    "rigl": MOVES,
    "set": MOVES | {"regrow": sc.regrow.set_(every=5, stop=0.75)},
    "ac_dc": LIFTS,
    "dpf": {"regrow": sc.feedback.dpf(every=3)},
    "sr_ste": {"pattern": "2:4", "regrow": "sr_ste", "schedule": "one_shot"},
    "soft_movement": {"regrow": "soft_movement", "allocation": "erk"},
    "str": {"regrow": "str"},
}


def made(folder, *callbacks, kind=Module, pruning=None, skip=(), logger=False, **options):
    model = kind()
    pruning = {"schedule": CUBIC, **(pruning or {})}
    pruner = sc.Pruner(model, 0.5 if "pattern" in pruning else 0.9, scope=sc.weights(model, skip=skip), **pruning)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[PruningCallback(pruner), *callbacks],
        logger=CSVLogger(folder) if logger else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_epochs": EPOCHS,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **options,
        },
    )
    return trainer, model, pruner


@pytest.mark.parametrize("kind", [Module, Manual])
def test_one_line_prunes_and_tells(tmp_path, kind):
    trainer, model, pruner = made(tmp_path, kind=kind, logger=True)
    trainer.fit(model, batches())
    assert pruner.steps == EPOCHS * BATCHES
    assert pruner.masks.pruned == zeros(sc.weights(model)) == k(0.9, pruner.masks.size)
    told = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "pruning/sparsity" in told


@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=0.3)]
)
@pytest.mark.parametrize("first", [True, False])
def test_averages_have_the_zeros(tmp_path, average, first):
    trainer, model, pruner = made(tmp_path, average())
    trainer.callbacks.sort(key=lambda one: isinstance(one, PruningCallback) != first)
    masks = pruner.masks
    trainer.fit(model, batches(), batches())
    assert zeros(sc.weights(model)) == k(0.9, masks.size)
    assert sc.check(model, pruner.masks) == {}
    assert model.seen[-1] == pytest.approx(0.9, abs=1e-3)  # also where it was validated


class Stop(Callback):
    """Stops in the middle of an epoch, right after a checkpoint."""

    def __init__(self, path, step=12):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, outputs, batch, at):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("stop")


@pytest.mark.parametrize("pruning", mostly_slow(METHODS, "ac_dc", "rigl", "dpf"))
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(tmp_path, pruning):
    """AC/DC is stopped where its masks are lifted."""
    through, want, want_pruner = made(tmp_path, pruning=pruning)
    through.fit(want, batches())
    stopped, model, pruner = made(tmp_path, Stop(tmp_path / "middle.ckpt"), pruning=pruning)
    with pytest.raises(RuntimeError, match="stop"):
        stopped.fit(model, batches())
    assert pruning is not LIFTS or pruner.sparsity == 0
    again, model, pruner = made(tmp_path, pruning=pruning)
    again.fit(model, batches(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert pruner.steps == EPOCHS * BATCHES
    assert pruner.masks == want_pruner.masks
    assert pruner.masks.pruned == k(0.5 if "pattern" in pruning else 0.9, pruner.masks.size)
    assert sc.check(model, pruner.masks) == {}
    assert pruner.metrics() == want_pruner.metrics()  # what grew before the stop counts too
    assert all(torch.equal(weight, want.state_dict()[name]) for name, weight in model.state_dict().items())


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("method", ["", "rigl", "ac_dc", "soft_movement"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_averages_go_on_bit_for_bit(tmp_path, method, average, first):
    """Validated or not (Lightning's own SWA is another one then, also without a pruner); a checkpoint shows zeros."""

    def run(*callbacks, validated=True, **options):
        trainer, model, pruner = made(tmp_path, AVERAGES[average](), *callbacks, pruning=METHODS[method])
        trainer.callbacks.sort(key=lambda one: isinstance(one, PruningCallback) != first)
        trainer.fit(model, batches(), batches() if validated else None, weights_only=True, **options)
        return model, pruner

    path = tmp_path / "middle.ckpt"
    want, want_pruner = run(validated=average == "swa")
    with pytest.raises(RuntimeError, match="stop"):
        run(Stop(path, step=20))
    saved = torch.load(path, weights_only=True)
    own = next(state for name, state in saved["callbacks"].items() if name.startswith("Pruning"))
    shown = saved["state_dict"]
    if swa := [state for name, state in saved["callbacks"].items() if name.startswith("StochasticWeight")]:
        shown = swa[0]["average_model_state"]
    masks = sc.Masks.from_bits(own["bits"], {name: torch.Size(shape) for name, shape in own["shapes"].items()})
    assert sc.check(shown, masks) == {}
    if method != "ac_dc":  # whose masks are lifted there
        assert any(not torch.equal(own["averages"][0][name], shown[name]) for name in masks)
    model, pruner = run(ckpt_path=path)
    assert pruner.masks == want_pruner.masks
    assert zeros(sc.weights(model)) == k(0.9, pruner.masks.size)
    assert same(copies(model), copies(want))


def test_averages_of_another_model(tmp_path):
    trainer, model, _ = made(tmp_path, EMAWeightAveraging(decay=0.9))
    trainer.callbacks[0] = PruningCallback(sc.Pruner(Module(), 0.9, schedule=CUBIC))
    with pytest.raises(InputError, match=r"not in this LightningModule.*give a Pruner of the LightningModule"):
        trainer.fit(model, batches())


class Rows:
    """Batches of 16, the last of an epoch of 5, all different; they go on where they stopped."""

    def __init__(self):
        x = torch.randn(7 * 16 + 5, 16, generator=torch.Generator().manual_seed(0))
        self.batches = [(rows, rows[:, :4].argmax(1)) for rows in x.split(16)]
        self.at = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("together", [1, 3])
def test_resume_with_an_unequal_last_batch_while_gradients_add_up(tmp_path, together):
    """Three batches a step, and the last two of an epoch."""
    options = {"accumulate_grad_batches": together, "max_epochs": EPOCHS * together}
    through, want, want_pruner = made(tmp_path, **options)
    through.fit(want, Rows())
    stopped, model, _ = made(tmp_path, Stop(tmp_path / "middle.ckpt", step=13), **options)
    with pytest.raises(RuntimeError, match="stop"):
        stopped.fit(model, Rows())
    again, model, pruner = made(tmp_path, **options)
    again.fit(model, Rows(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert pruner.steps == want_pruner.steps == EPOCHS * together * math.ceil(BATCHES / together)
    assert pruner.masks == want_pruner.masks
    assert zeros(sc.weights(model)) == k(0.9, pruner.masks.size)
    assert all(torch.equal(weight, want.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pruning": {"schedule": sc.linear(0.1, 0.6)}}, "other settings: schedule.*build this one with the same"),
        ({"pruning": {"allocation": "uniform"}}, "other settings: allocation.*build this one with the same"),
        ({"pruning": MOVES}, "other settings: score.*build this one with the same"),
        ({"skip": "net.3"}, r"another scope \(net\.3\.weight\).*the scope it had"),
    ],
    ids=["schedule", "allocation", "regrow", "scope"],
)
def test_a_checkpoint_of_another_run(tmp_path, changed, said):
    path = tmp_path / "middle.ckpt"
    stopped, model, _ = made(tmp_path, Stop(path))
    with pytest.raises(RuntimeError, match="stop"):
        stopped.fit(model, batches())
    other, model, pruner = made(tmp_path, **changed)
    masks, saved = pruner.masks, torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(InputError, match=said):
        other.fit(model, batches(), ckpt_path=path, weights_only=True)
    assert (pruner.steps, pruner.masks) == (0, masks)
    assert same(copies(model), saved)


def test_a_callback_used_twice(tmp_path):
    """Lightning refuses it; one after the other it may go into two Trainers."""
    trainer, model, pruner = made(tmp_path)
    callback = next(one for one in trainer.callbacks if isinstance(one, PruningCallback))
    for again in (callback, PruningCallback(pruner)):
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `PruningCallback`"):
            made(tmp_path, callback, again)
    trainer.fit(model, batches())
    other = made(tmp_path, max_epochs=1)[0]
    other.callbacks = [callback if isinstance(one, PruningCallback) else one for one in other.callbacks]
    other.fit(model, batches())
    assert pruner.steps == (EPOCHS + 1) * BATCHES
    assert zeros(sc.weights(model)) == k(0.9, pruner.masks.size)


def test_not_in_the_middle_of_another_training(tmp_path):
    trainer, model, pruner = made(tmp_path, Stop(tmp_path / "middle.ckpt"))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(model, batches())
    before, masks = copies(model), pruner.masks
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Stop)]
    with pytest.raises(StateError, match=r"in the middle of another training.*make a new Pruner"):
        trainer.fit(model, batches())
    assert same(copies(model), before)
    assert pruner.masks == masks


class Own(Module):
    """Makes its optimizer in the middle of the training, where Lightning knows nothing of it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.mine = False, None

    def configure_optimizers(self):
        return None

    def training_step(self, batch, at):
        loss = super().training_step(batch, at)
        self.mine = self.mine or torch.optim.SGD(self.parameters(), lr=0.1)
        self.mine.zero_grad()
        self.manual_backward(loss)
        self.mine.step()


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.:UserWarning")
def test_an_optimizer_that_is_built_later(tmp_path):
    trainer, model, pruner = made(tmp_path, kind=Own, pruning={"schedule": sc.linear(0, 10)})
    with pytest.raises(InputError, match=r"in none of these optimizers: give every optimizer of the model"):
        trainer.fit(model, batches())
    assert pruner.steps == 0


def test_a_nan_loss_where_the_masks_were_to_change(tmp_path):
    """All weights become NaN by it: the masks stay, a warning says why, and the end is not reached in silence."""

    class Spoiled(Module):
        def training_step(self, batch, at):
            kept.append(pruner.masks)
            return super().training_step(batch, at) * (float("nan") if len(kept) == 10 else 1)

    kept = []
    trainer, model, pruner = made(tmp_path, kind=Spoiled)
    with (
        pytest.warns(SecateurWarning, match=r"masks were to change at step 10, and stay as they are: .* holds .* NaN"),
        pytest.raises(StateError, match=r"schedule .* has not come to its end.*go on training"),
    ):
        trainer.fit(model, batches())
    assert pruner.masks == kept[9]
    assert 0 < pruner.sparsity < 0.9


@pytest.mark.parametrize("method", ["", "dpf", "soft_movement", "str"])
def test_only_models_at_their_final_sparsity_are_judged(tmp_path, method):
    """By this metric the first model, which has all its weights, would be the best, and the training would end."""
    best = ModelCheckpoint(tmp_path / "best", monitor="left", mode="max", save_top_k=2, filename="{epoch}")
    callbacks = [best, EarlyStopping("left", mode="max", patience=1), EMAWeightAveraging(decay=0.9)]
    trainer, model, pruner = made(tmp_path, *callbacks, pruning=METHODS[method], logger=True)
    trainer.fit(model, batches(), batches())
    assert float(best.best_model_score) == pytest.approx(0.1, abs=1e-3)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    masked = sum(int((weight == 0).sum()) for name, weight in state.items() if name in pruner.masks)
    assert masked == k(0.9, pruner.masks.size)
    told = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(told) < 20  # though the masks of some change at each of 40 steps


@pytest.mark.parametrize("pruning", [{}, MOVES], ids=["schedule", "regrow"])
def test_a_training_of_unknown_length(tmp_path, pruning):
    trainer, model, pruner = made(tmp_path, max_epochs=-1, pruning=pruning)
    before, masks = copies(model), pruner.masks
    with pytest.raises(InputError, match=r"fraction.* of the training, whose length is not known"):
        trainer.fit(model, batches())
    assert same(copies(model), before)
    assert pruner.masks == masks


def test_a_schedule_that_is_longer_than_the_training(tmp_path):
    trainer, model, _ = made(tmp_path, pruning={"schedule": sc.linear(0, 1000)})
    with pytest.raises(StateError, match="earlier stop"):
        trainer.fit(model, batches())


def test_a_trial_run_does_not_ask_for_the_end(tmp_path):
    trainer, model, pruner = made(tmp_path, pruning={"schedule": sc.linear(0, 1000)}, fast_dev_run=2)
    trainer.fit(model, batches())
    assert pruner.steps == 2


def test_what_is_no_pruner():
    with pytest.raises(InputTypeError, match=r"pruner is 0\.9|pruner is a float: give a secateur\.Pruner"):
        PruningCallback(0.9)
