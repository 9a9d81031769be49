"""Every instruction set that this machine has, and none: what the tests of the sparse kernels run on."""

import pytest
import torch

from secateur.runtime import native, products, tuning
from secateur.runtime.kernel_plans import Gain
from sparse_models import fake_times

LIBRARY = native.library()


def available():
    """Names of the instruction sets that can be chosen here."""
    if LIBRARY is None:
        return []
    before = native.isa()
    found = [name for name in ("avx512", "avx2", "neon", "portable") if LIBRARY.secateur_set_isa(name.encode()) == 0]
    assert LIBRARY.secateur_set_isa(before.encode()) == 0
    return found


def _use(name, monkeypatch):
    if name == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
        yield name
        return
    before = native.isa()
    LIBRARY.secateur_set_isa(name.encode())
    yield name
    LIBRARY.secateur_set_isa(before.encode())


@pytest.fixture(params=[*available(), "torch"])
def backend(request, monkeypatch):
    """Each instruction set of the native library, and torch without it."""
    yield from _use(request.param, monkeypatch)


@pytest.fixture(params=available() or [pytest.param("", marks=pytest.mark.skip("no native library"))])
def isa(request, monkeypatch):
    """Each instruction set of the native library."""
    yield from _use(request.param, monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call had that computed a chain."""
    seen, before = [], products.chain

    def chain(x, widths, count, *rest):
        out = before(x, widths, count, *rest)
        seen.extend([count] if out is not None else [])
        return out

    monkeypatch.setattr(products, "chain", chain)
    return seen


@pytest.fixture
def network_calls(monkeypatch):
    """How many steps each native call of a network had."""
    seen, before = [], products.network

    def network(x, steps, size):
        out = before(x, steps, size)
        seen.extend([len(steps)] if out is not None else [])
        return out

    monkeypatch.setattr(products, "network", network)
    return seen


@pytest.fixture
def without_native(monkeypatch):
    """A machine on which the native library was not built."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture
def sparse_wins(monkeypatch):
    """Tuning that takes no time and finds every sparse kernel twice as fast, so that tests depend on no clock."""
    fake_times(monkeypatch, lambda name, bucket: (2e-3, 1e-3))
    monkeypatch.setattr(tuning, "gain", lambda plain, fast, call: Gain(2.0, 1.9, 2.1))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No test knows what another one measured, or was warned of."""
    monkeypatch.setattr(tuning, "_CACHE", {})
    monkeypatch.setattr(products, "_warned", set())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
