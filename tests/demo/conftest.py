"""One run of the demo for all tests that look at what it leaves."""

import io
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from secateur.demo import digits, run


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One run of two epochs: its result, folder and output, and the caller's state before and after."""

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()

    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    screen = io.StringIO()
    before = state()
    result = run(epochs=2, seed=3, out=out, console=Console(file=screen, width=120))
    return result, out, screen.getvalue(), before == state()


@pytest.fixture
def data():
    return digits.load()
