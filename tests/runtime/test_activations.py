"""Activations after products, as torch computes them: any value, any place in a chain, and modules that change."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.runtime import activations, chains, native, products
from secateur.runtime.swapping import swap
from sparse_models import off, sparse, thin

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

MODULES = {
    "none": nn.Identity(),
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
}


def fused(*modules):
    """A Sequential of sparse layers, all of it one call."""
    fast = sparse(nn.Sequential(*modules))
    swap(fast, chains.SparseSequential)
    (chain,) = fast.fuse({(0, len(modules)): products.ALL})
    return fast, chain


def diagonal(count):
    """Layers of sixteen features that compute nothing."""
    made = [nn.Linear(16, 16, bias=False) for _ in range(count)]
    for layer in made:
        nn.init.eye_(layer.weight)
    return made


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("n", [1, 9, 640])  # rows, and panels
def test_is_what_torch_computes(isa, name, n):
    first, second = diagonal(2)
    fast, chain = fused(first, MODULES[name], second)
    spread = torch.cat([torch.linspace(-20, 20, 12 * n), torch.logspace(-8, 30, 2 * n), -torch.logspace(-8, 30, 2 * n)])
    x = spread[torch.randperm(16 * n)].view(n, 16)
    got, exact = chain(x), MODULES[name](x.double())
    assert got.equal(fast(x))
    assert ((got.double() - exact).abs() <= 1e-6 * x.double().abs().clamp_min(1)).all()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("features", [8, 5])  # whole vectors, and less
def test_what_is_not_finite_becomes_what_torch_makes_of_it(isa, name, features):
    values = [math.nan, math.inf, -math.inf, 1e37, -1e37, 0.0, 1.0]
    layers = [nn.Linear(1, features), nn.Linear(features, features, bias=False)]
    nn.init.zeros_(layers[0].weight)
    nn.init.eye_(layers[1].weight)
    _, chain = fused(layers[0], MODULES[name], layers[1])
    for value in values:
        chain.layers[0].bias.data.fill_(value)
        got, exact = chain(torch.zeros(3, 1)), MODULES[name](torch.full((3, features), value))
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_many_by_two_threads(isa):
    model = [nn.Linear(40, 3000), nn.GELU(), nn.Linear(3000, 40)]
    plain = thin(nn.Sequential(*model), 0.95)
    _, chain = fused(*model)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for n in (2, 20):
            x = torch.randn(n, 40)
            assert off(chain(x), copy.deepcopy(plain).double()(x.double())) <= 1e-5
    finally:
        torch.set_num_threads(before)


def test_settings_that_change_are_noticed(isa):
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU6())
    plain = copy.deepcopy(thin(model, 0.5))
    fast, _ = fused(*model)
    x = torch.randn(6, 16)
    assert off(fast(x), plain(x).detach()) <= 1e-5
    for place, name, value in ((1, "approximate", "tanh"), (3, "max_val", 0.1), (3, "min_val", -1.0)):
        before = fast(x)
        for one in (fast, plain):
            setattr(one[place], name, value)
        assert not fast(x).equal(before)
        assert off(fast(x), plain(x).detach()) <= 1e-5


class Loud(nn.GELU):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_known():
    known = [activations.number(module) for module in MODULES.values()]
    assert known == list(range(10))
    functions = (F.relu, F.relu6, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.hardswish, F.hardsigmoid)
    assert [activations.number(f) for f in functions] == [1, 2, 3, 5, 6, 7, 8, 9]
    strange = (Loud(), nn.Hardtanh(), nn.ReLU6, F.elu, len, None, nn.LeakyReLU())
    assert [activations.number(one) for one in strange] == [None] * 7


@pytest.mark.parametrize("number", [-1, 10, 16, 32])  # 16: a gate, of nothing
def test_a_number_that_is_none_is_refused(number):
    lib, blob = native.library(), native.pack(torch.eye(4))
    x, y = torch.ones(1, 4), torch.ones(1, 4)
    array = torch.tensor([number], dtype=torch.int32)
    blobs, biases = torch.tensor([blob.data_ptr()]), torch.zeros(1, dtype=torch.int64)
    given = (x.data_ptr(), 1, y.data_ptr(), 1)
    assert lib.secateur_chain(1, blobs.data_ptr(), None, biases.data_ptr(), array.data_ptr(), *given) == -1


@pytest.mark.parametrize(
    ("numbers", "sound"),
    [
        ([5, 1, 0], True),
        ([16 + 5, 1, 2], True),
        ([0, 16, 0], True),
        ([16, 16, 0], False),  # of a gate
        ([0, 1, 16], False),  # of nothing
        ([0, 16 + 10, 0], False),
    ],
)
def test_gates_that_make_no_sense_are_refused(numbers, sound):
    lib, blob = native.library(), native.pack(torch.eye(4))
    x, y = torch.ones(1, 4), torch.zeros(1, 4)
    array, blobs = torch.tensor(numbers, dtype=torch.int32), torch.tensor([blob.data_ptr()] * 3)
    biases = torch.zeros(3, dtype=torch.int64)
    given = (x.data_ptr(), 1, y.data_ptr(), 1)
    code = lib.secateur_chain(3, blobs.data_ptr(), None, biases.data_ptr(), array.data_ptr(), *given)
    assert code == (0 if sound else -1)
    assert bool(y.any()) == sound
