"""sample in other modes, threads and compiled code; after errors; and that nothing stays behind."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from sampling_cases import Out, X, exact, mlp, near, sample, seeded
from torch import nn
from torch.overrides import TorchFunctionMode
from zoo import ZOO, linear, rest

import secateur as sc
from secateur.errors import StateError

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


class Boom(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 6, 9, 15, 25])
def test_an_error_in_the_model(at):
    """Wherever it comes, it comes through as it is, or, where another way is left, not at all."""

    def forward(self, x):
        x = self.lstm(self.drop(self.a(x)))[0]
        self.counts[0] += 1
        if self.counts[0] > at:
            raise Boom("its own")
        return self.drop(x)

    model = seeded(forward, a=linear, drop=nn.Dropout, lstm=lambda: nn.LSTM(8, 8, 2, dropout=0.5), counts=[0])
    sc.dropout.recurrent(model, hidden=0.2)
    before = rest(model, X)

    def several():
        for n, seed in ((30, 0), (30, 0), (30, 1), (31, 0)):
            sample(model, X, n=n, seed=seed)

    with pytest.raises(Boom, match="its own"):
        several()
    after = rest(model, X)
    for part, was in before.items():
        assert after[part] == was, part
    assert torch.equal(model.a(X), model.a(X))


def test_an_interrupt_is_not_swallowed():
    def forward(self, x):
        x = self.drop(x)
        self.counts[0] += 1
        if self.counts[0] == 6:
            raise KeyboardInterrupt("by the user")
        return x

    model = seeded(forward, drop=nn.Dropout, counts=[0])
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(KeyboardInterrupt, match="by the user"):
        sample(model, X)
    assert torch._C._len_torch_function_stack() == depth
    assert not sc.dropout.noise.SAMPLING.get()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode):
    model = mlp()
    right = exact(model, X, 6)
    with mode():
        got = sample(model, X.clone(), n=6).samples
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    assert near(got, right)
    assert not got.requires_grad
    assert not got.is_inference()


def test_no_graph_is_kept():
    model = mlp()
    x = X.clone().requires_grad_()
    assert sample(model, x).samples.grad_fn is None
    model(x).sum().backward()
    assert x.grad is not None


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_inside_another_torch_function_mode():
    for name in ("Sequential", "LSTM", "BERT, sdpa", "TransformerDecoderLayer", "LockedDropout"):
        model, inputs, output = next(entry for entry in ZOO if entry.name == name).build()
        right = exact(model, inputs, 6, output)
        with Counting() as mode:
            assert near(sample(model, inputs, n=6, output=output).samples, right)
            assert mode.count > 0
        assert torch._C._len_torch_function_stack() == 0


def test_inside_a_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(linear(), nn.Dropout(0.5), Out(nn.LSTM(8, 8, 2, dropout=0.5))).eval()
    right = exact(model, X, 6)
    with FlopCounterMode(display=False):
        assert near(sample(model, X, n=6).samples, right)


def test_under_a_profiler():
    """There can be one only: it goes on."""
    model = mlp()
    with torch.profiler.profile() as profile:
        sample(model, X, n=6)
        model(X)
    assert len(profile.events()) > 10


def test_under_autocast():
    model = mlp()
    right = sample(model, X, n=6).samples
    with torch.autocast("cpu", torch.bfloat16):
        got = sample(model, X, n=6).samples
        assert got.dtype == torch.bfloat16
        assert near(sample(model, X, n=6).samples, got)
    assert near(got.float(), right, 3e-2)
    assert near(sample(model, X, n=6).samples, right)


def test_on_several_threads():
    """Of models that are new to it; in another process, as the profiler of torch can take this one with it."""
    code = """
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo
from torch import nn
import secateur as sc

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
models = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.LSTM(8, 8, 2, dropout=0.5)).eval() for _ in range(24)]
x = torch.randn(4, 8)
first = lambda answer: answer[0]
with ThreadPoolExecutor(4) as pool:
    got = list(pool.map(lambda i: sc.dropout.sample(models[i], x, n=6, output=first).samples, range(24)))
    again = list(pool.map(lambda i: sc.dropout.sample(models[0], x, n=6, output=first, seed=i % 2).samples, range(24)))
for i in range(24):
    assert torch.allclose(got[i], sc.dropout.sample(models[i], x, n=6, output=first).samples, atol=1e-6)
    assert torch.allclose(again[i], again[i % 2], atol=1e-6)
assert torch._dynamo.eval_frame._stance.stance == "default"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:sample leaves noise out:secateur.errors.SecateurWarning")
def test_a_sample_of_a_model_that_samples():
    """A model inside which another one is sampled."""
    inner = mlp()
    model = seeded(lambda s, x: s.drop(x) + sample(inner, X, n=4).mean, drop=nn.Dropout)
    right = sample(inner, X, n=4).mean
    got = sample(model, X, n=4).samples
    assert near(got, exact(model, X, 4), 1e-5)
    assert torch.allclose(sample(inner, X, n=4).mean, right)


def test_inside_compiled_code():
    """torch.compile cannot trace it."""
    model = mlp()
    right = sample(model, X, n=6).samples
    torch.compiler.reset()
    compiled = torch.compile(lambda x: sample(model, x, n=6).samples * 2, backend="eager")
    with pytest.raises(StateError, match="outside of the compiled"):
        compiled(X)
    assert near(sample(model, X, n=6).samples, right)


def test_a_compiled_model_goes_on_compiled():
    torch.compiler.reset()
    model = torch.compile(mlp(), backend="eager")
    plain = mlp()
    model(X)
    assert near(sample(model, X, n=6).samples, exact(plain, X, 6))
    assert torch.equal(model(X), plain(X))


def test_no_leak():
    for name in ("Sequential", "LSTM", "recurrent", "concrete", "BERT, sdpa"):
        model, inputs, output = next(entry for entry in ZOO if entry.name == name).build()
        sample(model, inputs, n=6, output=output)
        sc.dropout.find(model, inputs)
        watched = [weakref.ref(model), *(weakref.ref(module) for module in model.modules())]
        del model
        gc.collect()
        assert all(ref() is None for ref in watched), name


def test_no_tensors_stay_behind():
    model = mlp()
    sample(model, X, n=6)
    gc.collect()
    before = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    for seed in range(5):
        sample(model, X, n=6, seed=seed)
    gc.collect()
    assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) <= before
