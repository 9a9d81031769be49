"""The data, a plain model and a plain training loop: nothing in this file knows of pruning.

The data are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI Machine
Learning Repository, CC BY 4.0), as scikit-learn's `load_digits` gives them: 1797 grey images of 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn

TEST_IMAGES = 450  # a quarter
BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images `[n, 8, 8]` from 0 to 1 and labels `[n]` from 0 to 9, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training images."""
        return -(-len(self.train_images) // BATCH)


def load() -> Digits:
    """Read the images that travel in the package, split in the same way for everyone."""
    with resources.files("secateur.demo").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images = torch.from_numpy(arrays["images"]).float() / 16  # pixels are 0 to 16
        labels = torch.from_numpy(arrays["labels"]).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1998))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


class LSTMClassifier(nn.Module):
    """Reads an image row by row, 8 steps of 8 pixels, and says from its last state which digit it was."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n, 8, 8]` to logits `[n, 10]`."""
        _, (last, _) = self.lstm(images)
        logits: Tensor = self.head(last[-1])
        return logits


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of every training in the demo."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    epochs: int,
    *,
    seed: int = 0,
    after_epoch: Callable[[nn.Module], object] = lambda model: None,
) -> None:
    """Train as anybody would: shuffled batches, cross entropy, clipped gradients, a learning rate that rises and falls.

    Args:
        model, optimizer, data: what is trained, by what, on what.
        epochs: passes over the training images.
        seed: of the order of the batches.
        after_epoch: called with the model after each pass, to look at it.
    """
    order = torch.Generator().manual_seed(seed)
    peak = optimizer.param_groups[0]["lr"]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * data.steps_per_epoch)
    for _ in range(epochs):
        model.train()
        for batch in torch.split(torch.randperm(len(data.train_images), generator=order), BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
        after_epoch(model)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Fraction of the test images that the model names rightly."""
    model.eval()
    right = model(data.test_images).argmax(1) == data.test_labels
    return float(right.double().mean())


@contextmanager
def alone(seed: int) -> Iterator[None]:
    """One thread and random numbers from `seed`; what the caller had of both comes back afterwards.

    These matrices are so small that a second thread costs about what it brings, and with one thread the numbers
    are the same whatever the number of cores.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):  # the generator of the CPU: the only one that is used
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
