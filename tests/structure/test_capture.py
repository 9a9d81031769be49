import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, SecateurWarning, StructureError
from secateur.structure import capture as room
from secateur.structure import propose, rules
from secateur.structure.capture import RULES, capture, rule, table
from secateur.structure.policy import Policy

assert rules


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.c(x) if self.training else self.b(x)


def seen(model, *inputs, **policy):
    return capture(model, [(inputs, {})], Policy(**policy))


def test_calls_are_remembered_with_their_place():
    run = seen(Two(), torch.randn(3, 4)).runs[0]
    assert [(c.name, c.module) for c in run.calls] == [("linear", "a"), ("linear", "b")]
    assert run.calls[0].line.startswith("linear.py:") or run.calls[0].line.startswith("test_capture.py:")
    assert run.calls[0].used == {0}


def test_what_only_training_reaches_is_captured_too():
    cap = seen(Two(), torch.randn(3, 4))
    assert [run.training for run in cap.runs] == [False, True]
    assert cap.unseen == []


@pytest.mark.parametrize("used_in", [(True, False), (False,), (True,)])
def test_caches_outside_of_a_model_are_filled_before(used_in):
    model, cached = nn.Linear(4, 2), {}

    def shift(module, args, out):
        if module.training in used_in and not cached:
            cached["one"] = torch.ones(2)
        return out + cached["one"] if module.training in used_in else out

    model.register_forward_hook(shift)
    names = [[c.name for c in run.calls] for run in seen(model, torch.randn(3, 4)).runs]
    assert "ones" not in names[0]


def test_parameters_that_no_forward_reaches_are_named():
    model = Two()
    model.d = nn.Linear(2, 2)
    assert seen(model, torch.randn(3, 4)).unseen == ["d.weight", "d.bias"]


def test_outputs_are_held():
    cap = seen(Two(), torch.randn(3, 4))
    root, held = cap.ledger.solve()
    (field,) = cap.fields(cap.home[id(dict(cap.home.values())["b.bias"])][1])
    assert {held[root[i]] for i in field.flatten().long().tolist()} == {"an output of the model"}


def test_an_unknown_function_holds_with_its_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].register_forward_hook(lambda m, a, out: torch.linalg.pinv(out).T)
    root, held = (cap := seen(model, torch.randn(3, 4))).ledger.solve()
    (field,) = cap.fields(model[0].bias)
    assert "unknown function linalg_pinv in the model" in held[root[int(field[0])]]


def test_a_rule_that_does_not_fit_holds(monkeypatch):
    def bad(site):
        raise RuntimeError("oops")

    monkeypatch.setitem(RULES._choices, "linear", RULES._choices["linear"].__class__("linear", room.Rule(bad), ""))
    model = nn.Linear(4, 6)
    root, held = (cap := seen(model, torch.randn(3, 4))).ledger.solve()
    (field,) = cap.fields(model.bias)
    assert "its rule does not fit (RuntimeError: oops)" in held[root[int(field[0])]]


def test_a_function_has_one_rule():
    with pytest.raises(InputError, match="register yours under another name"):
        rule("linear")(lambda site: None)


def test_the_table_lists_every_rule():
    assert all(f"`{name}`" in table() for name in RULES)


def test_the_table_of_the_docs_is_that_of_the_rules():
    page = (Path(__file__).parents[2] / "docs" / "shrinking.md").read_text()
    made = "from secateur.structure import table; print(table())"  # rules of other tests are not ours
    table = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True).stdout
    assert table in page, f"put this table into docs/shrinking.md:\n\n{table}"


@pytest.mark.parametrize(
    "leave", [lambda y: y.detach().numpy(), lambda y: y.tolist(), lambda y: np.asarray(y.detach())]
)
def test_numbers_that_leave_torch_stay(leave):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 6)

        def forward(self, x):
            return leave(self.b(self.a(x).relu()).detach())

    small = sc.shrink(Net(), torch.randn(3, 4), 0.5)
    assert small.a.out_features == 8
    assert small.b.out_features == 6


def test_a_forward_that_returns_no_tensor_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 16)

        def forward(self, x):
            self.y = self.a(x)

    with pytest.raises(StructureError, match="no tensor is found in what the model returns, a NoneType: let it return"):
        sc.shrink(Net(), torch.randn(3, 4), 0.5)


def test_a_parameter_that_no_example_reaches_is_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.other = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 3)

        def forward(self, x, other=False):
            return (self.other if other else self.b)(self.a(x).relu())

    with pytest.warns(SecateurWarning, match="no example reaches other.weight, other.bias: .* Give an example"):
        sc.shrink(Net(), torch.randn(3, 4), 0.5)
    small = sc.shrink(Net(), [(torch.randn(3, 4),), (torch.randn(3, 4), True)], 0.5)
    assert small.other.in_features == 8


def test_calls_that_are_made_in_training_only_are_followed():
    class Net(nn.Module):
        def __init__(self, loud):
            super().__init__()
            self.a, self.b, self.c, self.loud = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2), loud

        def forward(self, x):
            y = self.a(x).relu()
            if self.training and self.loud:
                y = y * (16 / y.shape[-1])
            elif self.training:
                y = y.flip(-1)
            return self.c(self.b(y).relu())

    x = torch.randn(3, 4)
    assert sc.shrink(Net(loud=True), x, 0.5).a.out_features == 16
    small = sc.shrink(Net(loud=False), x, 0.5)
    assert small.a.out_features == 8
    assert small.train()(x).shape == (3, 2)
    assert [run.training for run in seen(Net(loud=True), x).runs] == [False, True]
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))
    assert [run.training for run in seen(plain, x).runs] == [False]


class Swapped(nn.Module):
    """In training it makes calls of the same names, with other weights, or other numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.width = numbers, 16
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        swap = self.training and not self.numbers
        a, b = (self.b, self.a) if swap else (self.a, self.b)
        y = a(x).relu().view(-1, self.width) * (self.width if self.training and self.numbers else 2)
        return self.c(y) + self.d(b(x).relu())


@pytest.mark.parametrize("numbers", [False, True])
def test_calls_of_the_same_names_that_training_makes_otherwise_are_followed(numbers):
    torch.manual_seed(0)
    model, x = Swapped(numbers), torch.randn(4, 6)
    assert [run.training for run in seen(model, x).runs] == [False, True]
    plan = propose(model, x, 0.5)
    small = sc.shrink(model, x, plan=plan).train()
    with torch.no_grad():
        for name, dims in plan.kept.items():
            for dim, kept in dims.items():
                gone = torch.ones(dict(model.named_parameters())[name].shape[dim]).index_fill(0, torch.tensor(kept), 0)
                model.get_parameter(name).index_fill_(dim, gone.nonzero().flatten(), 0)
    torch.testing.assert_close(small(x), model.train()(x))


class Positions(nn.Module):
    """Token and position embeddings, of which as many positions are taken as there are tokens."""

    def __init__(self, take):
        super().__init__()
        self.take, self.table = take, nn.Parameter(torch.randn(1, 12, 8))
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.outer(self.inner(x + self.take(self.table, x.shape[1])).relu())


@pytest.mark.parametrize(
    "take",
    [
        lambda t, n: t[:, :n],
        lambda t, n: t.narrow(1, 0, n),
        lambda t, n: t.transpose(0, 1).contiguous()[:n].transpose(0, 1),
        lambda t, n: t.split([n, t.shape[1] - n], 1)[0],
        lambda t, n: (t * 2)[:, -n:],
    ],
)
def test_what_a_slice_leaves_out_stays_for_longer_inputs(take):
    small = sc.shrink(Positions(take), torch.randn(2, 5, 8), 0.5)
    assert small.table.shape == (1, 12, 8)
    assert small.inner.out_features == 8
    assert small(torch.randn(2, 9, 8)).shape == (2, 9, 3)


class Parts(nn.Module):
    """One weight, in two slices that are views of views."""

    def __init__(self):
        super().__init__()
        self.w, self.read = nn.Parameter(torch.randn(24, 4)), nn.Linear(12, 3)

    def forward(self, x):
        d = len(self.w) // 2
        return self.read(x @ self.w.t()[:, :d] * (x @ self.w.t()[:, d:]).sigmoid())


def test_parts_of_which_every_one_is_taken_go():
    assert sc.shrink(Parts(), torch.randn(2, 4), 0.5).w.shape == (12, 4)


def test_threads_do_not_see_one_another():
    found, waits = [], threading.Barrier(2, timeout=60)

    class Meeting(Two):
        def forward(self, x):
            if not self.met:
                self.met = waits.wait() >= 0
            return super().forward(x)

    def run():
        model = Meeting()
        model.met = False
        found.append([c.module for c in seen(model, torch.randn(3, 4)).runs[0].calls])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [["a", "b"]] * 2
