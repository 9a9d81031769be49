"""closed_form: what very many samples tend to, and what the formula says; or an error, where there is no formula."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, Model, linear, rest, untouched

import secateur as sc
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError

closed_form = sc.dropout.closed_form
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def last(p=0.5, kind=nn.Dropout, bias=True, **options):
    return seeded(lambda: nn.Sequential(linear(), nn.Tanh(), kind(p, **options), nn.Linear(8, 5, bias=bias)))


MODELS = {
    "dropout .1": (lambda: last(0.1), X),
    "dropout .5": (lambda: last(0.5), X),
    "dropout .9": (lambda: last(0.9), X),
    "no bias": (lambda: last(bias=False), X),
    "in place": (lambda: last(0.3, inplace=True), X),
    "alpha": (lambda: last(0.3, nn.AlphaDropout), X),
    "first of all": (lambda: seeded(lambda: nn.Sequential(nn.Dropout(0.3), linear())), X),
    "sequences": (lambda: last(0.3), X.view(2, 3, 8)),
    "no batch": (lambda: last(0.3), X[0]),
    "LSTM before": (
        lambda: seeded(
            lambda: Model(lambda s, x: s.b(s.d(s.a(x)[0])), a=nn.LSTM(8, 8, 2), b=linear(), d=nn.Dropout(0.3))
        ),
        X.view(2, 3, 8),
    ),
    "functional": (lambda: seeded(lambda: Model(lambda s, x: s.a(F.dropout(x, 0.3, s.training)), a=linear())), X),
    "F.linear": (
        lambda: seeded(
            lambda: Model(lambda s, x: F.linear(s.d(x), s.a.weight, bias=s.a.bias), a=linear(), d=nn.Dropout())
        ),
        X,
    ),
    "off ones among them": (
        lambda: seeded(lambda: nn.Sequential(nn.Dropout(0.0), linear(), nn.Dropout(0.4), nn.Dropout(0.0), linear())),
        X,
    ),
    "BatchNorm before": (lambda: seeded(lambda: nn.Sequential(linear(), nn.BatchNorm1d(8), nn.Dropout(), linear())), X),
    "compiled": (lambda: torch.compile(last(0.3), backend="eager"), X),
    "float64": (lambda: last(0.3).double(), X.double()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_samples_tend_to(name):
    make, x = MODELS[name]
    model = make()
    found = closed_form(model, x)
    x = x.unsqueeze(0) if name == "no batch" else x
    got = sc.dropout.sample(model, x, n=20_000).samples
    got = got.squeeze(1) if name == "no batch" else got
    std = got.std(0)
    assert found.mean.shape == found.variance.shape == found.std.shape == std.shape
    assert abs(float((std / found.std).mean()) - 1) < 0.01
    assert ((std / found.std - 1).abs() < 0.05).all()
    assert ((got.mean(0) - found.mean).abs() < 6 * found.std / 20_000**0.5).all()
    assert found.mean.dtype == x.dtype


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_the_formula(p):
    model = last(p).double()
    hidden = model[1](model[0](X.double()))
    found = closed_form(model, X.double())
    weight, bias = model[3].weight, model[3].bias
    assert torch.allclose(found.mean, hidden @ weight.T + bias, rtol=1e-13)
    assert torch.allclose(found.mean, model(X.double()), rtol=1e-13)
    assert torch.allclose(found.variance, p / (1 - p) * hidden.square() @ weight.square().T, rtol=1e-12)
    assert torch.allclose(found.std, found.variance.sqrt())


def test_the_formula_of_alpha_dropout():
    """Of two values, x and SELU's lowest, both scaled and moved as torch does."""
    model, p, lowest = last(0.3, nn.AlphaDropout).double(), 0.3, -1.7580993408473766
    a = ((1 - p) * (1 + p * lowest**2)) ** -0.5
    b = -a * lowest * p
    hidden = model[1](model[0](X.double()))
    mean = a * ((1 - p) * hidden + p * lowest) + b
    variance = a**2 * p * (1 - p) * (hidden - lowest).square()
    found = closed_form(model, X.double())
    assert torch.allclose(found.mean, model[3](mean), rtol=1e-10)
    assert torch.allclose(found.variance, variance @ model[3].weight.square().T, rtol=1e-10)


def test_every_subset_by_hand():
    """Four inputs have 16 masks: all of them, with their chances."""
    model = seeded(lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))).double()
    x = X[:1, :4].double()
    masks = torch.tensor([[i >> j & 1 for j in range(4)] for i in range(16)]).double()
    chances = (masks * 0.7 + (1 - masks) * 0.3).prod(1, keepdim=True)
    outputs = model[1](x * masks / 0.7)
    mean = (chances * outputs).sum(0)
    found = closed_form(model, x)
    assert torch.allclose(found.mean[0], mean, rtol=1e-12)
    assert torch.allclose(found.variance[0], (chances * (outputs - mean).square()).sum(0), rtol=1e-12)


def after(change):
    return lambda: Model(lambda s, x: change(s.b(s.d(s.a(x)))), a=linear(), b=linear(), d=nn.Dropout())


def write(y):
    y[:, 0] = 0
    return y


NONE = {
    "ReLU after": (lambda: nn.Sequential(nn.Dropout(), nn.ReLU(), linear()), "relu follows the dropout"),
    "Tanh at the end": (lambda: nn.Sequential(nn.Dropout(), linear(), nn.Tanh()), "tanh follows"),
    "two Linear": (lambda: nn.Sequential(nn.Dropout(), linear(), linear()), "linear follows"),
    "two dropouts": (lambda: nn.Sequential(nn.Dropout(), linear(), nn.Dropout(), linear()), "another|follows"),
    "dropout on dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout(), linear()), "another dropout"),
    "dropout last": (lambda: nn.Sequential(linear(), nn.Dropout()), "more than one Linear|no Linear|follows"),
    "Dropout2d": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Dropout2d(), nn.Flatten(), linear()),
        "dropout2d drops several",
    ),
    "Dropout1d": (lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Dropout1d(), nn.Flatten(), linear()), "several"),
    "feature alpha": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.FeatureAlphaDropout(), nn.Flatten(), linear()), "several",
    ),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, dropout=0.5), "follows|not a tensor"),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "another dropout|follows"),
    "convolution": (lambda: nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Dropout(), nn.Conv1d(8, 8, 1)), "conv1d follows"),
    "DropConnect": (lambda: sc.dropout.DropConnect(8, 8), "follows"),
    "TargetedDropout": (lambda: sc.dropout.TargetedDropout(8, 8, p=0.5, target=0.5), "not noise on a tensor|follows"),
    "StochasticDepth": (lambda: nn.Sequential(linear(), sc.dropout.StochasticDepth(0.5), linear()), "several elements"),
    "concrete": (lambda: _concrete(), "not noise on a tensor|follows"),
    "residual": (lambda: Model(lambda s, x: x + s.a(s.d(x)), a=linear(), d=nn.Dropout()), "add|follows"),
    "weight twice": (lambda: Model(lambda s, x: s.a(s.d(x)) + s.a(x), a=linear(), d=nn.Dropout()), "follows"),
    "used twice": (lambda: Model(lambda s, x: (lambda h: s.a(h) * h)(s.d(x)), a=linear(), d=nn.Dropout()), "follows"),
    "scaled": (after(lambda y: y * 2), "mul"),
    "cut": (after(lambda y: y[:, :3]), "getitem"),
    "written into": (after(write), "setitem"),
    "added to in place": (after(lambda y: y.add_(1)), "add_"),
    "clamped in place": (after(lambda y: (y.clamp_(0), y)[1]), "clamp_"),
    "through .data": (after(lambda y: (y.data.mul_(2), y)[1]), "mul_|follows"),
    "with out=": (after(lambda y: (torch.mul(y, 2, out=y), y)[1]), "mul"),
    "a list": (after(lambda y: [y]), "more than one Linear|follows|no"),
    "chunks": (after(lambda y: y.chunk(2, 1)[0]), "chunk"),
    "written into before the Linear": (
        lambda: Model(lambda s, x: s.a(write(s.d(x.clone()))), a=linear(), d=nn.Dropout()), "setitem",
    ),
    "what it came from is written into": (
        lambda: Model(lambda s, x: (lambda h, d: (write(h), s.a(d))[1])(*(lambda h: (h, s.d(h)))(s.a(x))), a=linear(),
                      d=nn.Dropout()), "setitem",
    ),
    "weights computed after": (
        lambda: Model(lambda s, x: F.linear(s.d(x), s.a.weight * 2), a=linear(), d=nn.Dropout()), "mul",
    ),
    "attention of training before": (
        lambda: Model(
            lambda s, x: s.a(s.d(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if s.training else 0.0))),
            a=linear(), d=nn.Dropout(),
        ), "another dropout|follows",
    ),
    "no dropout": (lambda: nn.Sequential(linear(), nn.Tanh()), "no dropout call"),
    "off": (lambda: nn.Sequential(nn.Dropout(0.0), linear()), "no dropout call"),
    "off for good": (lambda: Model(lambda s, x: s.a(F.dropout(x, 0.5, False)), a=linear()), "no dropout call"),
}  # fmt: skip


def _concrete():
    model = nn.Sequential(linear())
    sc.dropout.concrete(model, n_data=100)
    return model


@pytest.mark.parametrize("name", NONE)
def test_there_is_none(name):
    make, message = NONE[name]
    model = seeded(make)
    before = rest(model, X)
    with pytest.raises(
        InputError, match=rf"there is no closed form: .*({message}).*sc\.dropout\.sample\(model, inputs\)"
    ):
        closed_form(model, X)
    assert rest(model, X) == before


@pytest.mark.parametrize("entry", ZOO, ids=[entry.name for entry in ZOO])
@pytest.mark.filterwarnings("ignore:closed_form leaves noise out:secateur.errors.SecateurWarning")
@pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning")
def test_the_zoo_has_the_std_of_samples_or_none(entry):
    """Where there is a closed form, it is right; and the model is as it was."""
    with untouched(entry) as (model, inputs, output):
        found = None
        with contextlib.suppress(InputError):
            found = closed_form(model, inputs)
        if found is not None:
            assert output is None
            if entry.free:
                std = sc.dropout.sample(model, inputs, n=4000).std
                assert abs(float((std / found.std).nanmean()) - 1) < 0.03


def test_which_of_the_zoo_have_one():
    have = set()
    for entry in ZOO:
        model, inputs, _ = entry.build()
        if entry.free:
            try:
                closed_form(model, inputs)
            except InputError:
                continue
            have.add(entry.name)
    assert have == {
        "F.dropout", "F.dropout always on", "alpha", "in place, into the input", "a compiled part", "traced by fx",
        "a scripted part without noise",
    }  # fmt: skip


def test_noise_out_of_reach_is_named():
    def forward(self, x):
        x = self.a(x)
        if self.training:
            x = F.dropout(x, 0.5)
        return self.b(self.d(x))

    model = Model(forward, a=linear(), b=linear(), d=nn.Dropout()).eval()
    for _ in range(2):
        with pytest.warns(SecateurWarning, match=r"closed_form leaves noise out: dropout \(line \d+\).*self\.training"):
            closed_form(model, X)


def test_rate_1():
    with pytest.raises(InputError, match=r"rate of dropout in 2 is 1\.0.*below 1"):
        closed_form(last(1.0), X)


def test_the_rate_and_the_weights_of_now():
    model = last(0.2)
    before = closed_form(model, X)
    model[2].p = 0.5
    assert torch.allclose(closed_form(model, X).variance, before.variance * 4)  # p / (1 - p): 1 for 1/4
    with torch.no_grad():
        model[3].weight.mul_(2)
        model[3].bias.mul_(2)
    found = closed_form(model, X)
    assert torch.allclose(found.variance, before.variance * 16)
    assert torch.allclose(found.mean, before.mean * 2)
    model[2].p = 0.0
    with pytest.raises(InputError, match="no dropout call"):
        closed_form(model, X)
    assert torch.allclose(closed_form(model.train().eval() and last(0.2), X * 2).mean, last(0.2)(X * 2))


def test_in_training_mode():
    with pytest.raises(StateError, match=r"model\.eval\(\) first"):
        closed_form(last().train(), X)
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        closed_form(None, X)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode):
    model = last()
    right = closed_form(model, X)
    with mode():
        found = closed_form(model, X.clone())
    assert torch.equal(found.variance, right.variance)
    assert not found.mean.requires_grad
    assert not found.mean.is_inference()


def test_no_leak():
    model = last()
    closed_form(model, X)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_an_error_of_the_model():
    def forward(self, x):
        raise ArithmeticError("its own")

    model = Model(forward, d=nn.Dropout()).eval()
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(ArithmeticError, match="its own"):
        closed_form(model, X)
    assert torch._C._len_torch_function_stack() == depth


def test_no_rounding_below_zero():
    """The std of an output that nothing moves is 0, not NaN."""
    model = last(0.5)
    with torch.no_grad():
        model[3].weight[0] = 0
    found = closed_form(model, X)
    assert (found.std[:, 0] == 0).all()
    assert (found.std[:, 1:] > 0).all()
