"""A rate for each weight: sparse variational dropout."""

import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import anatomy
from secateur.dropout.learned import finish, penalty, to_masks, variational
from secateur.dropout.learned.variational import kl
from secateur.errors import InputError, InputTypeError


def exact_kl(alpha):
    """KL of N(w, alpha w^2) from the log-uniform prior, up to a constant: -0.5 log alpha + E log|1 + sqrt(alpha) e|."""
    n = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * n**2) / math.sqrt(2 * math.pi)
    values = density * (1 + math.sqrt(alpha) * n).abs().clamp(min=1e-12).log()
    return -0.5 * math.log(alpha) + float(torch.trapezoid(values, n))


def test_kl_is_the_integral_within_two_hundredths():
    at_infinity = exact_kl(1e8)
    for alpha in (0.02, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0):
        found = float(kl(torch.tensor(math.log(alpha), dtype=torch.float64)))
        assert abs(found - (exact_kl(alpha) - at_infinity)) < 0.02, alpha


def test_kl_falls_to_zero():
    values = kl(torch.linspace(-8, 8, 50, dtype=torch.float64))
    assert bool((values.diff() < 0).all())
    assert 0 < float(values[-1]) < 1e-3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (2, 5)),
        (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 6)),
        (nn.Conv2d(4, 2, 3, stride=2, groups=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_outputs_have_the_mean_and_variance_of_drawn_weights(layer, shape):
    torch.manual_seed(0)
    x, n = torch.randn(shape), 10_000
    rates = variational(layer, n_data=10, warmup=0)
    with torch.no_grad():
        rates.value("weight").uniform_(-3, 0)
        local = layer(x.repeat(n, *[1] * (len(shape) - 1))).unflatten(0, (n, shape[0]))
    deviation = (0.5 * rates.value("weight")).exp().detach()
    rates.remove()
    weights = layer.weight.detach() + deviation * torch.randn(n, *deviation.shape)
    drawn = torch.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, x))(weights).detach()
    scale = drawn.std(0)
    assert float(((local.mean(0) - drawn.mean(0)) / scale).abs().max()) < 0.06
    assert float((local.std(0) / scale - 1).abs().max()) < 0.05


def test_a_recurrent_module_draws_weights_once_a_forward():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    rates = variational(lstm, n_data=10, warmup=0, log_sigma2=-2.0)
    assert len(rates.values) == 8
    x = torch.randn(1, 1, 3).expand(6, 1, 3)
    first, second = lstm(x)[0], lstm(x)[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in rates.parameters())
    assert all(float(weight.grad.abs().sum()) > 0 for weight in lstm.parameters())
    assert all(flat is own for flat, own in zip(lstm._flat_weights, lstm.parameters(), strict=True))


def test_the_noise_of_a_recurrent_module_has_its_sigma():
    torch.manual_seed(0)
    rnn = nn.RNN(1, 1, bias=False, nonlinearity="relu")
    nn.init.constant_(rnn.weight_ih_l0, 5.0)
    variational(rnn, n_data=10, warmup=0, log_sigma2=2 * math.log(0.5))
    outputs = torch.stack([rnn(torch.ones(1, 1, 1))[0].squeeze() for _ in range(4000)])
    assert abs(outputs.mean().item() - 5) < 0.05
    assert abs(outputs.std().item() - 0.5) < 0.03


def test_attention_and_other_modules_draw_weights_too():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.GRUCell(8, 4), nn.ConvTranspose1d(4, 2, 3)])
    rates = variational(model, n_data=10, warmup=0, log_sigma2=-2.0)
    assert "0.out_proj.weight" in rates.rates
    x = torch.randn(5, 1, 8)
    y = model[1](model[0](x, x, x)[0][0], torch.ones(1, 4))
    model[2](y[..., None].expand(-1, -1, 5)).sum().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in rates.parameters())


def test_a_subclass_with_its_own_forward_draws_weights():
    class Squared(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight**2, self.bias)

    torch.manual_seed(0)
    layer = Squared(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    variational(layer, n_data=10, warmup=0, log_sigma2=0.0)
    outputs = torch.stack([layer(torch.ones(1, 3)) for _ in range(2000)])
    assert abs(outputs.mean().item() - 3) < 0.3  # E of the squares, not the square of the mean


def test_each_type_that_anatomy_calls_linear_draws_the_noise_of_its_outputs(monkeypatch):
    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    monkeypatch.setitem(anatomy._BY_TYPE, Of, anatomy.Layer("linear"))
    layer = Of()
    variational(layer, n_data=10, warmup=0, log_sigma2=0.0)
    first, second = layer(torch.ones(2, 4))
    assert not torch.equal(first, second)  # one drawn weight would give both the same


def test_the_kl_grows_over_the_warm_up():
    model = nn.Linear(4, 3)
    rates = variational(model, n_data=10, warmup=4)
    whole = kl(rates.log_alpha(next(rates.members()))).sum().item() / 10
    found = [penalty(model).item() for _ in range(6)]
    assert found == pytest.approx([whole * share for share in (0, 0.25, 0.5, 0.75, 1, 1)])
    model.eval()
    assert penalty(model).item() == pytest.approx(whole)
    assert int(rates.steps) == 6


def test_resumed_rates_go_on_as_if_they_had_not_stopped():
    def build():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        rates = variational(model, n_data=10, warmup=8)
        return model, rates, torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=0.01)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            (model(torch.randn(5, 4)).square().mean() + penalty(model)).backward()
            optimizer.step()

    straight = build()
    steps(straight[0], straight[2], range(6))
    stopped, resumed = build(), build()
    steps(stopped[0], stopped[2], range(3))
    for new, old in zip(resumed, stopped, strict=True):
        new.load_state_dict(old.state_dict())
    steps(resumed[0], resumed[2], range(3, 6))
    for one, other in zip(straight[:2], resumed[:2], strict=True):
        assert all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())


def test_the_threshold_is_log_alpha_of_three():
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 0.1]]))
    rates = variational(model, n_data=10, warmup=0)
    with torch.no_grad():
        rates.value("weight").copy_(torch.tensor([[2.9, 3.1, -1.0]]))
    assert to_masks(model)["weight"].tolist() == [[True, False, False]]
    assert rates.rates == {"weight": pytest.approx(2 / 3)}
    assert finish(model).pruned == 2
    assert model.weight.tolist() == [[1.0, 0.0, 0.0]]


def test_training_prunes_what_the_data_do_not_need():
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = 2 * x[:, :1] - 3 * x[:, 1:2]
    model = nn.Linear(10, 1)
    rates = variational(model, n_data=256, warmup=100, log_sigma2=-6.0)
    optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=0.03)
    fading = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 600)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean() / 0.01 + penalty(model)).backward()
        optimizer.step()
        fading.step()
    assert to_masks(model)["weight"].tolist() == [[True, True] + [False] * 8]
    finish(model)
    assert model.weight[0, :2].tolist() == pytest.approx([2, -3], abs=0.05)


def test_half_precision_weights_learn_in_float32():
    model = nn.Linear(4, 3).bfloat16()
    rates = variational(model, n_data=10, warmup=0)
    assert rates.value("weight").dtype == torch.float32
    out = model(torch.ones(2, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    (out.float().sum() + penalty(model)).backward()
    lstm = nn.LSTM(3, 2).bfloat16()
    variational(lstm, n_data=10, warmup=0)
    assert lstm(torch.ones(2, 1, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_a_scope_chooses_the_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))
    rates = variational(model, n_data=10, warmup=0, scope=sc.weights(model, only=["1.weight_hh*"]))
    assert list(rates.rates) == ["1.weight_hh_l0"]
    with torch.no_grad():
        x = torch.randn(2, 1, 4)
        assert torch.equal(model[0](x), model[0](x))


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"warmup": 1.5}, InputTypeError, "a third of the training"),
        ({"warmup": True}, InputTypeError, "a third of the training"),
        ({"warmup": -1}, InputError, "0 or more"),
        ({"log_sigma2": "low"}, InputTypeError, "such as -10"),
        ({"n_data": 0}, InputError, "len\\(dataset\\)"),
        ({"n_data": math.nan}, InputError, "len\\(dataset\\)"),
        ({"n_data": "many"}, InputTypeError, "len\\(dataset\\)"),
    ],
)
def test_values_that_cannot_be_used(options, error, remedy):
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=remedy):
        variational(model, **{"n_data": 10, "warmup": 0, **options})
    assert not model._forward_hooks
