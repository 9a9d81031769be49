"""One run of the demo for all tests that look at what it leaves."""

import io
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from secateur.demo import digits, run


def state():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """Runs a demo of two epochs: its result, folder and output, and whether the caller's state is as before."""

    def one(demo):
        out, screen, before = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO(), state()
        result = demo(epochs=2, seed=3, out=out, console=Console(file=screen, width=120))
        return result, out, screen.getvalue(), before == state()

    return one


@pytest.fixture(scope="session")
def shared(told):
    """One run for all tests that look at what it leaves."""
    return told(run)


@pytest.fixture(scope="session")
def flat():
    """The words of a screen in one line."""
    return lambda text: " ".join(text.replace("│", " ").split())


@pytest.fixture
def data():
    return digits.load()
