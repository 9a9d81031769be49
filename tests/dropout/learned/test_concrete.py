"""A rate for each layer: concrete dropout."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.dropout import noise
from secateur.dropout.learned import concrete, finish, penalty, to_masks, to_scores
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError


def set_rate(rates, name, p):
    with torch.no_grad():
        rates.value(name).fill_(math.log(p / (1 - p)))


def test_the_penalty_is_that_of_the_paper():
    model = nn.Linear(4, 3)
    rates = concrete(model, n_data=50, length_scale=0.3, rate=0.2)
    squares = (model.weight.square().sum() + model.bias.square().sum()).item()
    entropy = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert penalty(model).item() == pytest.approx((0.5 * 0.3**2 * squares / 0.8 - 4 * entropy) / 50)
    # the authors' own: twice that, for a loss without 0.5
    theirs = 0.3**2 / 50 * squares / 0.8 + 2 / 50 * 4 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert 2 * penalty(model).item() == pytest.approx(theirs)
    assert rates.rates == {"": pytest.approx(0.2)}


def test_masks_are_nearly_bernoulli_and_keep_the_mean():
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    concrete(layer, n_data=10, rate=0.3)
    out = layer(torch.ones(20_000, 1)).detach()
    assert abs(float(out.mean()) - 1) < 0.02
    assert abs(float((out < 0.5 / 0.7).double().mean()) - 0.3) < 0.02
    assert float(((out < 0.05) | (out > 0.95 / 0.7)).double().mean()) > 0.85


@pytest.mark.parametrize(
    ("layer", "shape", "mask"),
    [
        (nn.Linear(5, 2), (3, 4, 5), (3, 4, 5)),
        (nn.Conv1d(4, 2, 3), (3, 4, 6), (3, 4, 1)),
        (nn.Conv2d(4, 2, 3), (3, 4, 6, 6), (3, 4, 1, 1)),
        (nn.Conv2d(4, 2, 3), (4, 6, 6), (4, 1, 1)),
        (nn.ConvTranspose3d(4, 2, 3), (3, 4, 6, 6, 6), (3, 4, 1, 1, 1)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_a_convolution_drops_whole_channels(layer, shape, mask, monkeypatch):
    seen = []
    genuine = noise.uniform

    def spy(like, shape, **options):
        seen.append(tuple(shape))
        return genuine(like, shape, **options)

    monkeypatch.setattr(noise, "uniform", spy)
    concrete(layer, n_data=10, rate=0.5)
    layer(torch.ones(shape))
    assert seen == [mask]


def test_the_gradient_of_the_rate_is_that_of_the_expected_loss():
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    rates = concrete(layer, n_data=10, rate=0.3)
    x = torch.ones(400_000, 1, dtype=torch.float64)
    (layer(x) - 1).square().mean().backward()  # variance p / (1 - p), for hard masks
    wanted = 1 / (1 - 0.3) ** 2 * 0.3 * 0.7  # d/dp, times dp/dlogit
    assert float(rates.value("").grad) == pytest.approx(wanted, rel=0.15)


def test_data_that_allow_it_raise_the_rate_and_others_lower_it():
    found = {}
    for n_data in (5, 100_000):
        torch.manual_seed(0)
        x = torch.randn(200, 8)
        y = x.sum(1, keepdim=True)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        rates = concrete(model, n_data=n_data, rate=0.1)
        optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().mean() + penalty(model)).backward()
            optimizer.step()
        found[n_data] = rates.rates
    assert all(found[5][name] > 0.09 > 0.04 > found[100_000][name] for name in ("0", "2")), found


def test_frozen_rates_are_ordinary_dropout():
    torch.manual_seed(0)
    layer = nn.Linear(1000, 1, bias=False)
    nn.init.ones_(layer.weight)
    rates = concrete(layer, n_data=10, rate=0.25)
    rates.freeze()
    assert not any(p.requires_grad for p in rates.parameters())
    outputs = layer(torch.ones(500, 1000)).detach()
    units = (outputs * 0.75).round()
    assert torch.allclose(outputs * 0.75, units, atol=2e-3)  # each input is dropped or kept, nothing between
    assert abs(float(units.mean()) / 1000 - 0.75) < 0.01
    plain = nn.functional.linear(torch.ones(2, 1000), layer.weight)
    assert torch.equal(layer.eval()(torch.ones(2, 1000)), plain)
    token = noise.SAMPLING.set(True)
    try:
        assert not torch.equal(layer(torch.ones(2, 1000)), plain)
    finally:
        noise.SAMPLING.reset(token)


def test_frozen_rates_ask_for_nothing_and_cannot_be_frozen_again():
    model = nn.Linear(3, 2)
    rates = concrete(model, n_data=10)
    rates.freeze()
    with pytest.raises(StateError, match="leave the penalty out"):
        penalty(model)
    with pytest.raises(StateError, match=r"frozen already: read rates\.rates"):
        rates.freeze()
    rates.remove()
    with pytest.raises(StateError, match="must not be called again"):
        rates.remove()


def test_a_loaded_state_reaches_frozen_rates():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    rates, saved = concrete(model, n_data=10, rate=0.1), concrete(other, n_data=10, rate=0.4)
    rates.freeze()
    rates.load_state_dict(saved.state_dict())
    assert rates.frozen == {"": pytest.approx(0.4)}
    twin = copy.deepcopy(rates)
    twin.load_state_dict(concrete(nn.Linear(3, 2), n_data=10, rate=0.2).state_dict())
    assert twin.frozen == {"": pytest.approx(0.2)}
    assert rates.frozen == {"": pytest.approx(0.4)}


def test_an_input_given_by_name_is_dropped_too():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    concrete(layer, n_data=10, rate=0.5)
    x = torch.ones(4, 3)
    assert not torch.equal(layer(input=x), layer.eval()(input=x))


def test_masks_take_exactly_the_fraction_of_the_smallest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3))
    rates = concrete(model, n_data=10)
    set_rate(rates, "0", 0.37)
    set_rate(rates, "2", 0.5)
    masks = to_masks(model)
    half_up = {name: math.floor(Fraction(rates.rates[name]) * n + Fraction(1, 2)) for name, n in (("0", 77), ("2", 33))}
    assert masks.counts() == {"0.weight": half_up["0"], "2.weight": half_up["2"]}
    size = model[0].weight.detach().abs()
    assert float(size[~masks["0.weight"]].max()) <= float(size[masks["0.weight"]].min())
    assert finish(model) == masks
    assert int((model[0].weight == 0).sum()) == half_up["0"]


def test_scores_share_a_budget_by_the_rates_whatever_the_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50))
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight * 100)
    rates = concrete(model, n_data=10)
    set_rate(rates, "0", 0.05)
    set_rate(rates, "2", 0.5)
    scores = to_scores(model)
    masks = sc.prune(model, 0.5, score=scores, scope=sc.weights(model, only=list(scores)))
    counts = masks.counts()
    assert sum(counts.values()) == 2500
    assert counts["2.weight"] > 2 * counts["0.weight"]


def test_attention_is_left_out_by_default_and_refused_by_name():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(SecateurWarning, match=r"no rate for self_attn\.in_proj_weight.*scope=sc\.weights\(model, only="):
        rates = concrete(model, n_data=10)
    assert list(rates.rates) == ["linear1", "linear2"]
    rates.remove()
    with pytest.raises(InputError, match=r"out_proj.*name those, scope="):
        concrete(model, n_data=10, scope=sc.weights(model, only="self_attn.out_proj"))
    with pytest.raises(InputError, match="concrete dropout is for Linear and convolutions"):
        concrete(nn.LSTM(2, 2), n_data=10)


def test_a_layer_written_with_its_inputs_first_has_a_rate():
    from transformers.pytorch_utils import Conv1D

    rates = concrete(nn.Sequential(Conv1D(6, 4), nn.Linear(6, 2)), n_data=10)
    assert [place.inputs for place in rates.places] == [4, 6]


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_inputs_of_a_convolution_are_its_channels(layer):
    (place,) = concrete(layer, n_data=10).places
    assert place.inputs == 4


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"rate": 1.0}, InputError, "above 0 and below 1"),
        ({"rate": 0}, InputError, "above 0"),
        ({"length_scale": -1}, InputError, "such as 1e-4"),
        ({"length_scale": None}, InputTypeError, "such as 1e-4"),
        ({"n_data": -5}, InputError, "above 0"),
    ],
)
def test_values_that_cannot_be_used(options, error, remedy):
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=remedy):
        concrete(model, **{"n_data": 10, **options})
    assert not model._forward_pre_hooks
