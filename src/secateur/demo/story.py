"""The story of the demo, in eight steps, each with numbers measured on the spot.

The heart of it is `prune_gradually`: three lines of secateur around a training loop that stays as it is.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.demo import elsewhere, pictures
from secateur.demo.digits import Digits, LSTMClassifier, accuracy, adam, alone, load, train
from secateur.demo.stage import Watch, finish, progress, require, save_pictures, unwatched, versions, write
from secateur.errors import StateError
from secateur.measurement.timing import Comparison, compare
from secateur.sparsity import fraction

EPOCHS = 20


# Step 1: train a dense model --------------------------------------------------------------------------------


def train_dense(data: Digits, epochs: int, *, seed: int = 0, watch: Watch = unwatched) -> LSTMClassifier:
    """Train a new model: no pruning yet."""
    with alone(seed):
        model = LSTMClassifier()
        train(model, adam(model), data, epochs, seed=seed, after_epoch=watch)
    return model


# Step 2: prune it all at once -------------------------------------------------------------------------------


def prune_at_once(dense: nn.Module, sparsity: float) -> nn.Module:
    """Zero the smallest weights of a copy in one go: the sparsity is exact, the accuracy is gone."""
    model = copy.deepcopy(dense)
    sc.prune(model, sparsity)
    return model


# Step 3: prune it gradually, while it trains on -------------------------------------------------------------


def prune_gradually(
    dense: nn.Module,
    sparsity: float | sc.Count,
    data: Digits,
    epochs: int,
    *,
    seed: int = 0,
    watch: Watch = unwatched,
) -> tuple[nn.Module, sc.Masks]:
    """Train a copy on while its zeros become more and more, then heal it for the last third of the steps."""
    model = copy.deepcopy(dense)  # only so that we can compare the two in the end
    optimizer = adam(model)

    steps = epochs * data.steps_per_epoch
    pruner = sc.Pruner(model, sparsity, schedule=sc.cubic(start=0, stop=2 * steps // 3, every=10))
    pruner.attach(optimizer)  # from now on, pruned weights are zero after each optimizer.step()
    with alone(seed):
        train(model, optimizer, data, epochs, seed=seed, after_epoch=watch)  # the same loop as before
    masks = pruner.finish()  # the sparsity is exactly the one asked for, or this is an error

    return model, masks


def train_on(dense: nn.Module, data: Digits, epochs: int, *, seed: int = 0, watch: Watch = unwatched) -> nn.Module:
    """Train a copy on without pruning: what the gradually pruned model has to be compared with."""
    model = copy.deepcopy(dense)
    with alone(seed):
        train(model, adam(model), data, epochs, seed=seed, after_epoch=watch)  # the same batches, too
    return model


# Step 4: rounds of what? ------------------------------------------------------------------------------------


def rounds_of_what_remains(dense: nn.Module, rounds: int = 10) -> list[float]:
    """Prune a tenth in each round with `torch.nn.utils.prune`, which takes it of the weights that *remain*.

    Returns:
        The sparsity after each round. The last is 1 - 0.9^10 = 0.651.
    """
    model = copy.deepcopy(dense)
    assert isinstance(model.lstm, nn.LSTM)
    assert isinstance(model.head, nn.Linear)
    weights = [(model.lstm, "weight_ih_l0"), (model.lstm, "weight_hh_l0"), (model.head, "weight")]
    sparsities = []
    for _ in range(rounds):
        torch_prune.global_unstructured(weights, pruning_method=torch_prune.L1Unstructured, amount=0.1)
        masks = [getattr(module, name + "_mask") for module, name in weights]
        sparsities.append(sum(int((m == 0).sum()) for m in masks) / sum(m.numel() for m in masks))
    return sparsities


def rounds_of_the_total(dense: nn.Module, sparsity: float, rounds: int = 10) -> list[float]:
    """Prune a tenth of what was asked in each round; secateur counts all weights, so the last round ends on it.

    Returns:
        The sparsity after each round.
    """
    pruner = sc.Pruner(copy.deepcopy(dense), sparsity, schedule=sc.linear(start=0, stop=rounds))
    sparsities = []
    for _ in range(rounds):
        pruner.step()
        sparsities.append(pruner.sparsity)
    pruner.finish()
    return sparsities


# Step 5: test it, save it, and load it where there is no secateur -------------------------------------------


def same_model(model: nn.Module, dense: nn.Module) -> bool:
    """Say whether pruning left the names, the modules and the kinds of parameters as they were."""

    def anatomy(one: nn.Module) -> list[Any]:
        modules = [(name, type(module)) for name, module in one.named_modules()]
        tensors = [(name, type(p), p.shape, p.dtype) for name, p in one.named_parameters()]
        return [list(one.state_dict()), modules, tensors]

    return anatomy(model) == anatomy(dense)


def save(dense: nn.Module, pruned: nn.Module, masks: sc.Masks, data: Digits, out: Path) -> None:
    """Write plain state_dicts, the masks beside them, and what the pruned model answers to the test images."""
    write(out / "dense.safetensors", to_bytes(dense.state_dict()))
    write(out / "pruned.safetensors", to_bytes(pruned.state_dict()))
    masks.save(out / "masks.safetensors")
    save_answers(pruned, data, out)


def save_answers(pruned: nn.Module, data: Digits, out: Path) -> None:
    """Write the test images, their labels, and the logits of the pruned model."""
    with alone(0), torch.no_grad():
        logits = pruned.eval()(data.test_images)
    test = {"images": data.test_images, "labels": data.test_labels, "logits": logits}
    write(out / "test.safetensors", to_bytes(test))


def load_elsewhere(out: Path) -> dict[str, Any]:
    """Let a fresh process without secateur load the pruned model and repeat its predictions: see `elsewhere.py`."""
    script = out.resolve() / "elsewhere.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise StateError(f"the pruned model did not load in a fresh process: run {script} to see why; {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Step 6: measure what it gained -----------------------------------------------------------------------------


def measure(dense: nn.Module, pruned: nn.Module, data: Digits) -> Comparison:
    """Compare time and size; the kernels of PyTorch multiply by zeros as by any number, so expect no gain here."""
    with alone(0):
        return compare({"dense": dense, "pruned": pruned}, data.test_images, metric=lambda model: accuracy(model, data))


# Step 7: save it small --------------------------------------------------------------------------------------


def pack(pruned: nn.Module, out: Path) -> dict[str, Any]:
    """Save the pruned model packed, beside the plain file, and see that every bit comes back."""
    file = out / "pruned.packed.safetensors"
    written = sc.save(pruned, file)
    with alone(0):
        back = LSTMClassifier()
    sc.load(file, into=back)
    same = all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), pruned.state_dict().values(), strict=True))
    plain = (out / "pruned.safetensors").stat().st_size
    return {"bytes": written.file_bytes, "over_plain": written.file_bytes / plain, "same_bits": same}


# Step 8: run it faster --------------------------------------------------------------------------------------


def speed_up(pruned: nn.Module, data: Digits) -> nn.Module:
    """Copy the pruned model for inference: tuned, on one thread, for one image and for all test images at once."""
    with alone(0):
        return sc.accelerate(pruned, [data.test_images[:1], data.test_images])


def race(dense: nn.Module, pruned: nn.Module, fast: nn.Module, data: Digits) -> dict[str, Any]:
    """Time the three side by side, and see that the fast one answers as the pruned one does, one by one and at once."""
    models, images = {"dense": dense, "pruned": pruned, "fast": fast}, data.test_images
    with alone(0):
        comparisons = {str(len(given)): compare(models, given, seconds=0.3) for given in (images[:1], images)}
        with torch.inference_mode():
            before = pruned.eval()(images)
            after = torch.stack([fast(images), torch.cat([fast(images[i : i + 1]) for i in range(len(images))])])
        right = accuracy(fast, data)
    return {
        "comparisons": {count: one.to_dict() for count, one in comparisons.items()},
        "accuracy": right,
        "other_answers": int((after.argmax(2) != before.argmax(1)).sum()),
        "relative_error": float((after - before).abs().max() / before.abs().max()),
        "plan": json.loads(json.dumps(sc.explain(fast).to_dict())),  # in lists, as it will be read
    }


# All of it --------------------------------------------------------------------------------------------------


def run(
    *,
    epochs: int = EPOCHS,
    sparsity: float = 0.9,
    seed: int = 0,
    out: Path = Path("secateur-demo"),
    console: Console | None = None,
) -> dict[str, object]:
    """Run the demo from end to end, and leave a run folder.

    Args:
        epochs: passes over the training data of *each* training: the dense one, then the retraining while pruning,
            and the dense one's own continuation with which that is compared (so the pruned model has seen twice as
            many). The sparsity is exact for any number; the accuracies of the README need the default.
        sparsity: fraction of the 70,912 weights that become zero, 0 <= s < 1.
        seed: of the initial weights and of the batches. The split of the data is always the same.
        out: the run folder. It is made if need be; files of an earlier run are replaced.
        console: where to draw a progress bar and the table; None draws nothing.

    Returns:
        What `run.json` in the run folder holds.

    Raises:
        InputError, InputTypeError: a value that cannot be used; nothing has been done.
        OSError: the folder cannot be written; nothing has been trained.
    """
    began = time.perf_counter()
    out = Path(out)
    require(epochs, seed, out)
    fraction(sparsity)
    begin(out, lambda model: sc.prune(model, sparsity))
    data = load()
    history: dict[str, list[dict[str, float]]] = {"dense": [], "gradual": [], "dense_longer": []}

    with progress(console, 3 * epochs + 4 * epochs / 5) as (say, tick):

        def watch(curve: str) -> Watch:
            first = 0 if curve == "dense" else epochs

            def look(model: nn.Module) -> None:
                step = (first + len(history[curve]) + 1) * data.steps_per_epoch
                history[curve].append({"step": step, **look_at(model, data)})
                tick(1)

            return look

        say("1. training a dense model")
        dense = train_dense(data, epochs, seed=seed, watch=watch("dense"))
        say("2. pruning it all at once")
        at_once = prune_at_once(dense, sparsity)
        say("3. pruning it gradually, while it trains on")
        pruned, masks = prune_gradually(dense, sparsity, data, epochs, seed=seed, watch=watch("gradual"))
        say("   training the dense one on, to compare")
        dense_longer = train_on(dense, data, epochs, seed=seed, watch=watch("dense_longer"))
        say("4. pruning in ten rounds, of two kinds")
        remaining, total = rounds_of_what_remains(dense), rounds_of_the_total(dense, sparsity)
        tick(epochs / 5)
        say("5. loading it where there is no secateur")
        save(dense, pruned, masks, data, out)
        fresh = load_elsewhere(out)
        tick(epochs / 5)
        say("6. measuring time and size")
        comparison = measure(dense, pruned, data)
        say("7. saving it packed")
        packed = pack(pruned, out)
        tick(epochs / 5)
        say("8. making it run faster")
        fast = race(dense, pruned, speed_up(pruned, data), data)
        tick(epochs / 5)

    result: dict[str, Any] = {
        "versions": versions(),
        "settings": {"epochs": epochs, "sparsity": float(sparsity), "seed": seed, "threads": 1},
        "data": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "weights": sc.weights(pruned).size,
        "parameters": sum(p.numel() for p in pruned.parameters()),
        "dense": look_at(dense, data),
        "one_shot": look_at(at_once, data),
        "gradual": look_at(pruned, data),
        "dense_longer": look_at(dense_longer, data),
        "rounds": {"of_what_remains": remaining, "of_the_total": total},
        "same_model": same_model(pruned, dense),
        "fresh_process": fresh,
        "comparison": comparison.to_dict(),
        "packed": packed,
        "fast": fast,
        "layers": [
            {"name": line.name, "weights": line.weights, "zeros": line.got} for line in sc.report(pruned, masks).lines
        ],
        "history": history,
    }
    save_pictures(result, out, pictures.NAMES, pictures.draw)
    return finish(result, began, out, console, pictures.tell)


def begin(out: Path, attempt: Callable[[LSTMClassifier], object]) -> None:
    """Make the folder of a story, with the script that loads its model without secateur; first see that it can be told.

    Args:
        out: the folder.
        attempt: done to a new model: raises if so much cannot go.
    """
    with alone(0):
        attempt(LSTMClassifier())
    out.mkdir(parents=True, exist_ok=True)
    write(out / "elsewhere.py", Path(elsewhere.__file__).read_bytes())


def look_at(model: nn.Module, data: Digits) -> dict[str, float]:
    """Count the zeros among the weights that may be pruned, and test the model."""
    weights = sc.weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    with alone(0):
        return {"zeros": zeros, "sparsity": zeros / weights.size, "accuracy": accuracy(model, data)}
