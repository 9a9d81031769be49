"""find: each dropout call of each model, or a name for what is out of reach; and the model as it was."""

import random
import threading
import warnings

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, Model, bits, linear, rest, untouched, vectors

import secateur as sc
from secateur.errors import InputTypeError, StateError
from secateur.measurement.costs import peak_bytes

find = sc.dropout.find
IDS = [entry.name for entry in ZOO]
X = vectors()


def kinds(found):
    return [(call.path, call.kind, call.rate) for call in found.calls]


def named(found):
    return [(one.path, one.what.split(" (")[0]) for one in found.unreached]


def test_the_zoo_is_large_and_each_has_a_name():
    assert len(ZOO) >= 50
    assert len(set(IDS)) == len(IDS)
    assert sum(not entry.free for entry in ZOO) >= 6


@pytest.mark.parametrize("entry", ZOO, ids=IDS)
def test_all_calls_are_found_or_named(entry):
    model, inputs, _ = entry.build()
    found = find(model, inputs)
    assert kinds(found) == entry.calls
    assert named(found) == entry.named
    for one in found.unreached:
        assert one.path in dict(model.named_modules())
        assert one.what in str(one)
        assert len(one.why) > 20


@pytest.mark.parametrize("entry", ZOO, ids=IDS)
def test_the_model_stays_as_it_was(entry):
    with untouched(entry) as (model, inputs, _):
        find(model, inputs)


@pytest.mark.parametrize("entry", ZOO, ids=IDS)
def test_what_is_found_does_not_depend_on_the_random_state(entry):
    model, inputs, _ = entry.build()
    first = find(model, inputs)
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        assert kinds(find(model, inputs)) == kinds(first)
        assert named(find(model, inputs)) == named(first)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_rate_0_is_off(p):
    found = find(nn.Sequential(linear(), nn.Dropout(p), nn.LSTM(8, 8, 3, dropout=p)).eval(), torch.randn(5, 3, 8))
    assert (len(found.calls), found.off) == ((3, 0) if p else (0, 3))
    assert f"{len(found.calls)} dropout calls" in str(found)


def test_off_for_good_is_off():
    model = Model(lambda s, x: F.dropout(F.dropout(s.a(x), 0.5, False), 0.2, s.training), a=linear()).eval()
    found = find(model, X)
    assert kinds(found) == [("", "dropout", 0.2)]
    assert found.off == 1


def test_shapes_lines_and_table():
    model = nn.Sequential(linear(), nn.Dropout(0.25), nn.MultiheadAttention(8, 2, dropout=0.5))
    model.forward = lambda x: model[2](*[model[1](model[0](x))] * 3)[0]
    found = find(model.eval(), torch.randn(5, 3, 8))
    assert [tuple(call.shape) for call in found.calls] == [(5, 3, 8), (6, 5, 5)]
    assert all(call.line > 0 for call in found.calls)
    table = str(found)
    for word in ("1 ", "dropout", "0.25", "5x3x8", "2 ", "attention", "0.5", "2 dropout calls"):
        assert word in table


def test_what_is_out_of_reach_is_in_the_table_and_says_what_to_do():
    entry = next(entry for entry in ZOO if entry.name == "behind if self.training")
    found = find(*entry.build()[:2])
    told = found.table().text(width=None)
    for words in ("out of reach", "if self.training", "functional.dropout(x, p, self.training)", "nn.Dropout"):
        assert words in told


NOISE = {
    "rand": lambda x: torch.rand(x.shape),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape),
    "randn_like": torch.randn_like,
    "normal": lambda x: torch.normal(x, 1.0),
    "randint": lambda x: torch.randint(0, 9, x.shape),
    "randperm": lambda x: x[:, torch.randperm(8)],
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 8),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.5),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "poisson": lambda x: torch.poisson(x.abs()),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9), x.sigmoid()),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "trunc_normal_": lambda x: nn.init.trunc_normal_(torch.empty_like(x)),
    "xavier": lambda x: nn.init.xavier_uniform_(torch.empty_like(x)),
    "distributions": lambda x: torch.distributions.Gamma(x.abs() + 1, 1.0).sample(),
    "Beta": lambda x: torch.distributions.Beta(2.0, 2.0).sample(x.shape),
    "Laplace": lambda x: torch.distributions.Laplace(0.0, 1.0).rsample(x.shape),
    "generator": lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)),
    "Python": lambda x: random.random(),
    "numpy": lambda x: float(np.random.rand()),
    "fork": lambda x: torch.random.fork_rng() and torch.rand(()),
}


@pytest.mark.parametrize("how", NOISE)
def test_all_noise_of_training_is_named(how):
    def forward(self, x):
        x = self.drop(self.a(x))
        return x + NOISE[how](x) if self.training else x

    model = Model(forward, a=linear(), drop=nn.Dropout(0.3)).eval()
    states = bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())
    found = find(model, X)
    assert kinds(found) == [("drop", "dropout", 0.3)]
    assert found.unreached
    assert (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())) == states


@pytest.mark.parametrize(
    "how",
    [name for name in NOISE if name not in ("Python", "numpy")],
)
def test_all_noise_of_eval_is_named(how):
    model = Model(lambda s, x: s.drop(x) + NOISE[how](x), drop=nn.Dropout(0.3)).eval()
    (one, *_) = find(model, X).unreached
    assert "random in eval() too" in one.why


def test_the_line_of_what_is_out_of_reach():
    def forward(self, x):
        return F.dropout(x, 0.3, self.training) + (torch.rand_like(x) if self.training else 0)

    (one,) = find(Model(forward).eval(), X).unreached
    assert f"line {forward.__code__.co_firstlineno + 1}" in one.what


def test_what_only_eval_calls_is_found():
    """A call that training does not come to: it has the rate that it shows."""

    def forward(self, x):
        x = self.drop(self.a(x))
        return x if self.training else self.last(x)

    model = Model(forward, a=linear(), drop=nn.Dropout(0.3), last=nn.Dropout(0.1)).eval()
    assert kinds(find(model, X)) == [("drop", "dropout", 0.3), ("last", "dropout", 0.1)]


def test_another_call_of_attention_in_training_is_named():
    def forward(self, x):
        if self.training:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        return F.scaled_dot_product_attention(x, x, x)

    found = find(Model(forward).eval(), torch.randn(2, 4, 8))
    assert not found.calls
    assert named(found) == [("", "attention")]


def test_part_of_the_model_in_training_mode():
    """The old way of Monte-Carlo dropout."""
    model = nn.Sequential(linear(), nn.Dropout(0.3), nn.LSTM(8, 8, 2, dropout=0.5)).eval()
    model[1].train()
    model[2].train()
    found = find(model, torch.randn(5, 3, 8))
    assert kinds(found) == [("1", "dropout", 0.3), ("2", "lstm", 0.5)]
    assert [module.training for module in model] == [False, True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Dropout(), r"training mode: call model\.eval\(\) first"),
        (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()).train(), r"training mode"),
    ],
)
def test_in_training_mode(make, message):
    with pytest.raises(StateError, match=message):
        find(make(), X)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm])
def test_a_normalisation_in_training_mode(kind):
    model = nn.Sequential(linear(), nn.Sequential(kind(8)), nn.Dropout()).eval()
    model[1][0].train()
    before = rest(model)
    with pytest.raises(StateError, match=r"1\.0 is in training mode.*statistics.*eval\(\)"):
        find(model, X)
    assert rest(model) == before


@pytest.mark.parametrize("wrong", [None, 3, "model", lambda x: x, nn.Linear, torch.ones(3)])
def test_no_module(wrong):
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        find(wrong, X)


def test_a_model_that_fails():
    def forward(self, x):
        raise ArithmeticError("of its own")

    model = Model(forward, drop=nn.Dropout()).eval()
    before = rest(model)
    with pytest.raises(ArithmeticError, match="of its own"):
        find(model, X)
    assert rest(model) == before


def test_a_model_that_fails_in_training_only():
    def forward(self, x):
        x = self.drop(x)
        if self.training:
            raise ValueError("give targets")
        return x

    found = find(Model(forward, drop=nn.Dropout(0.2)).eval(), X)
    assert kinds(found) == [("drop", "dropout", 0.2)]
    assert "give targets" in str(found.unreached[0])


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(linear(), nn.Dropout(0.2)).eval()
    model.lock = threading.Lock()
    found = find(model, X)
    assert kinds(found) == [("1", "dropout", 0.2)]
    assert not found.unreached  # its modules are copied one by one


def test_training_that_writes_into_the_model():
    """Code books and counters: the copy that runs in training has its own."""

    def forward(self, x):
        if self.training:
            self.book.data.mul_(2)
            self.count += 1
            self.steps += 1
        return self.drop(x) * self.book

    model = Model(forward, drop=nn.Dropout(0.2), book=nn.Parameter(torch.ones(8), requires_grad=False), steps=0).eval()
    model.register_buffer("count", torch.zeros(()))
    before = rest(model)
    find(model, X)
    assert rest(model) == before


def test_weights_are_not_copied():
    """Twice the memory of a large model would be too much."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Dropout(0.2)).eval()
    peak = peak_bytes(_Finds(model), ((torch.randn(1, 1000),), {}))
    assert peak < 1000 * 1000 * 4 / 2


class _Finds(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, x):
        find(self.model[0], x)


def exported():
    model = nn.Sequential(linear(), nn.Dropout(0.3), linear()).eval()
    return torch.export.export(model, (X,)).module()


def test_the_graph_that_was_exported_in_eval_drops_nothing():
    found = find(exported(), X)
    assert not found.calls
    assert found.off == 1


def test_a_warning_in_the_copy_is_no_failure():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(exported(), X).unreached == ()


def test_off_for_good_is_no_call_of_a_model_that_cannot_be_copied():
    """Its modules are copied one by one, so that the copy can run in training."""
    model = Model(lambda s, x: F.dropout(s.drop(x), 0.5, False), drop=nn.Dropout(0.2)).eval()
    model.lock = threading.Lock()
    found = find(model, X)
    assert kinds(found) == [("drop", "dropout", 0.2)]


def traced(model):
    with zoo.deprecated_jit():
        return torch.jit.trace(model, X)


@pytest.mark.parametrize("make", [zoo.scripted, traced])
def test_scripted_and_traced_models_are_named(make):
    found = find(make(nn.Sequential(linear(), nn.Dropout(0.3)).eval()), X)
    assert not found.calls
    assert [one for one in named(found) if one[1] == "dropout"] == [("", "dropout")]  # once, not for each part too
    assert "before torch.jit.script" in found.table().text(width=None)


def test_frozen_graphs_have_no_mode():
    with zoo.deprecated_jit():
        frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(linear(), nn.Dropout(0.3)).eval()))
    assert not find(frozen, X).calls


@pytest.mark.parametrize("inside", [False, True])
def test_under_the_modes_of_the_user(inside):
    model, inputs, _ = next(entry for entry in ZOO if entry.name == "BERT, sdpa").build()
    before = kinds(find(model, inputs))
    with torch.inference_mode() if inside else torch.enable_grad():
        assert kinds(find(model, inputs)) == before
        assert torch.is_inference_mode_enabled() is inside


def test_inputs_of_any_form():
    model = nn.Sequential(linear(), nn.Dropout(0.2)).eval()
    x = X
    for inputs in (x, (x,), {"input": x}):
        assert kinds(find(model, inputs)) == [("1", "dropout", 0.2)]


def test_find_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry in ZOO:
            find(*entry.build()[:2])


def test_without_parameters():
    assert kinds(find(nn.Dropout(0.2).eval(), X)) == [("", "dropout", 0.2)]


def test_a_model_of_no_dropout():
    found = find(nn.Sequential(linear(), nn.Tanh()).eval(), X)
    assert (found.calls, found.unreached, found.off) == ((), (), 0)
    assert "0 dropout calls" in str(found)


def test_the_rate_of_now():
    model = nn.Sequential(nn.Dropout(0.2)).eval()
    find(model, X)
    model[0].p = 0.7
    assert kinds(find(model, X)) == [("0", "dropout", 0.7)]


def test_zoo_helpers_notice_what_they_should():
    """The tests above are worth nothing if `rest` sees no change."""
    model, x = nn.Sequential(nn.BatchNorm1d(8), nn.LSTM(8, 8)).eval(), X
    changes = {
        "state_dict": lambda: model[0].running_mean.add_(1),
        "ids": lambda: setattr(model[1], "weight_ih_l0", nn.Parameter(model[1].weight_ih_l0.detach())),
        "training": lambda: model[1].train(),
        "hooks": lambda: model[1].register_forward_hook(print),
        "flat weights": lambda: model[1]._flat_weights.reverse(),
        "inputs": lambda: x.add_(1),
        "attributes": lambda: setattr(model, "other", 1),
        "plain": lambda: setattr(model[1], "dropout", 0.7),
        "random": lambda: torch.rand(()),
    }
    for part, change in changes.items():
        before = zoo.rest(model, x)
        change()
        assert zoo.rest(model, x)[part] != before[part], part
