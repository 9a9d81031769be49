"""Other tensors for one forward: seen by the thread that runs it, by nobody else, and by nobody afterwards."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import secateur as sc
from secateur.dropout.substitution import begin, end, sweep

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Doubled:
    """Hooks of a module that computes with twice its parameters."""

    def __init__(self, module):
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(end, always_call=True)

    def before(self, module, args):
        begin(module, [(p, 2 * p) for p in module.parameters()])


def doubled(module):
    Doubled(module)
    return module


class Own(nn.Module):
    """Uses its weight in several ways: as an attribute of, a method of, and in a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight.T + self.weight.sum(0) + torch.stack([self.weight, self.weight]).mean((0, 1))


class Stop(BaseException):
    """As KeyboardInterrupt: torch calls no hook for it."""


class Stopping(nn.Linear):
    def forward(self, x):
        if self.stop:
            raise Stop("now")
        return super().forward(x)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), Own, lambda: nn.LSTM(4, 3, 2), lambda: nn.Conv1d(2, 3, 2)])
def test_a_forward_computes_with_them(make):
    module, twice = make(), make()
    twice.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})
    doubled(module)
    x = X[None] if isinstance(module, nn.Conv1d) else X
    got, right = module(x), twice(x)
    if isinstance(got, tuple):
        got, right = got[0], right[0]
    assert torch.equal(got, right)
    got.sum().backward()
    right.sum().backward()
    for ours, theirs in zip(module.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 2 * theirs.grad)


def test_the_module_never_holds_them():
    module = doubled(nn.Linear(4, 3))
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append((m.weight, m._parameters["weight"])), prepend=True)
    weight = module.weight
    module(X)
    assert all(one is weight for one in seen[0])


def test_one_inside_another():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    right = nn.functional.linear(nn.functional.linear(X, 2 * model[0].weight, model[0].bias), *model[1].parameters())
    doubled(model[0])
    model.register_forward_pre_hook(lambda m, args: begin(m, [(model[0].bias, model[0].bias * 0.5)]))
    model.register_forward_hook(end)
    assert torch.allclose(model(X), right)  # the bias is halved outside, and doubled inside
    assert torch._C._len_torch_function_stack() == 0


def test_an_error_ends_it():
    module = doubled(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(X[:, :3])
    assert torch._C._len_torch_function_stack() == 0


def test_after_an_interruption_nothing_is_substituted():
    module = doubled(Stopping(4, 3))
    module.stop = True
    with pytest.raises(Stop, match="now"):
        module(X)
    weight = module.weight.detach().clone()
    assert torch.equal(module.state_dict()["weight"], weight)
    assert torch.equal(module.weight * 1, weight)
    module.stop = False
    right = nn.functional.linear(X, 2 * module.weight, 2 * module.bias)
    assert torch.equal(module(X), right)
    assert torch._C._len_torch_function_stack() == 0


def test_an_interruption_of_samples_leaves_no_handler():
    model = nn.Sequential(nn.LSTM(4, 4), Stopping(4, 4))
    model = nn.Sequential(model[0], _First(), model[1]).eval()
    model[2].stop = False
    sc.dropout.recurrent(model, hidden=0.5)
    rates = sc.dropout.variational(model, n_data=10, warmup=0, scope=sc.weights(model, only=["2.weight"]))
    right = sc.dropout.sample(model, X, n=4).samples
    model[2].stop = True
    with pytest.raises(Stop, match="now"):
        sc.dropout.sample(model, X, n=4)
    assert torch._C._len_torch_function_stack() == 0
    model[2].stop = False
    assert torch.allclose(sc.dropout.sample(model, X, n=4).samples, right)
    rates.remove()


class _First(nn.Module):
    def forward(self, answer):
        return answer[0]


def test_sweep_leaves_other_modes_alone():
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Other():
        sweep()
        end(nn.Linear(1, 1))
        assert torch._C._len_torch_function_stack() == 1


def test_two_threads_each_see_their_own():
    """One waits inside its forward while the other runs the same module, reads it and saves it."""
    module, inside, go = nn.Linear(4, 3), threading.Event(), threading.Event()
    threads = threading.local()

    def before(m, args):
        if getattr(threads, "doubles", False):
            begin(m, [(m.weight, 2 * m.weight)])
            inside.set()
            assert go.wait(20)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(end, always_call=True)
    plain, weight, answers = module(X), module.weight.detach().clone(), []

    def work():
        threads.doubles = True
        answers.append(module(X))

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    assert torch.equal(module(X), plain)
    assert torch.equal(module.state_dict()["weight"], weight)
    go.set()
    thread.join()
    assert torch.equal(answers[0], nn.functional.linear(X, 2 * module.weight, module.bias))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_under_torch_compile(fullgraph):
    torch.compiler.reset()
    module = doubled(nn.Linear(4, 3))
    compiled = torch.compile(module, backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        assert torch.equal(compiled(X), module(X))
    assert torch._C._len_torch_function_stack() == 0


def test_exported():
    module = doubled(nn.Linear(4, 3)).eval()
    right = module(X)
    assert torch.allclose(torch.export.export(module, (X,)).module()(X), right)


def test_parameters_may_be_replaced():
    module = doubled(nn.Linear(4, 3))
    ones = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, ones, (X,)), 2 * X.sum(1, keepdim=True).expand(2, 3) + 2)
    module.load_state_dict(ones, assign=True)
    assert torch.equal(module(X), 2 * X.sum(1, keepdim=True).expand(2, 3) + 2)


def test_threads_that_sample_train_and_ask_at_once():
    """Every kind of layer and rate that substitutes; in another process, as its threads may take it with them."""
    done = subprocess.run([sys.executable, "-c", _STRESS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


_STRESS = """
import copy, sys, threading, warnings
import torch
from torch import nn
import secateur as sc

warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.setswitchinterval(1e-3)
torch.manual_seed(0)
x = torch.randn(3, 5, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.drop, self.head = sc.dropout.DropConnect(8, 8, p=0.3), nn.Dropout(0.4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.lstm(x)[0]
        return self.head(self.drop(self.mix(self.attention(x, x, x, need_weights=False)[0].mean(1))))


def recurrent(model):
    sc.dropout.recurrent(model, hidden=0.25, weight=0.2, input=0.1)

made = {
    "recurrent": recurrent,
    "variational": lambda model: sc.dropout.variational(model, n_data=100, warmup=0, log_sigma2=-3.0),
    "hard_concrete": lambda model: sc.dropout.hard_concrete(model, n_data=100, rate=0.4),
    "concrete": lambda model: sc.dropout.concrete(model, n_data=100),
    "both": lambda model: (recurrent(model), sc.dropout.variational(model, n_data=100, warmup=0, log_sigma2=-3.0)),
}
for name, make in made.items():
    model = Net()
    make(model)
    model.eval()
    with torch.no_grad():
        plain = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = str(sc.dropout.find(model, x))
    sc.dropout.sample(model, x, n=6, seed=0)
    right = [sc.dropout.sample(model, x, n=6, seed=seed).samples for seed in range(3)]
    wrong, stop = [], threading.Event()

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as error:
                wrong.append(f"{name}: {error!r}")
        return threading.Thread(target=run)

    def ask():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(x), plain):
                    wrong.append(f"{name}: a plain answer")

    def read():
        while not stop.is_set():
            if any(not torch.equal(value, state[key]) for key, value in model.state_dict().items()):
                wrong.append(f"{name}: the state_dict")

    def sample(seed):
        for _ in range(3):
            if not torch.allclose(sc.dropout.sample(model, x, n=6, seed=seed).samples, right[seed], atol=1e-6):
                wrong.append(f"{name}: a sample")

    def look():
        for _ in range(3):
            if str(sc.dropout.find(model, x)) != found:
                wrong.append(f"{name}: what was found")

    def gradient():
        for _ in range(8):
            loss = model(x).sum()
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    others = [guarded(ask), guarded(ask), guarded(read)]
    workers = [*(guarded(lambda seed=seed: sample(seed)) for seed in range(3)), guarded(look), guarded(gradient)]
    for thread in (*others, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    if wrong:
        sys.exit(str(sorted(set(wrong))))
"""
