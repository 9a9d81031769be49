"""Weights that a model computes from others: refused with the recipe, and read as the model computes them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import secateur as sc
from secateur.computed_weights import effective, weights_as_used
from secateur.errors import InputError


def double():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    return Double()


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", double())
    return layer


def legacy_weight_norm(layer, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, name)


COMPUTED = {
    "parametrized": (
        lambda: parametrized(nn.Linear(4, 4)),
        r"remove_parametrizations\(model\[1\], 'weight'\)",
    ),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "remove_parametrizations"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "remove_parametrizations"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "remove_parametrizations"),
    "conv": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), "remove_parametrizations"),
    "old weight_norm": (lambda: legacy_weight_norm(nn.Linear(4, 4)), "remove_weight_norm"),
    "old weight_norm of an LSTM": (lambda: legacy_weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), "remove_weight_norm"),
    "LSTM": (lambda: parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), "'weight_hh_l0'"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "spectral_norm"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), r"sc\.from_torch_prune\(model\)"),
    "pruned LSTM": (lambda: prune.random_unstructured(nn.LSTM(4, 4), "weight_hh_l0", 0.5), "from_torch_prune"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_the_recipe(kind):
    make, remedy = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(InputError, match=remedy) as caught:
        sc.weights(model)
    assert str(caught.value).startswith("1")
    assert list(sc.weights(model, skip="1")) == ["0.weight"]
    assert list(sc.weights(model, only="0")) == ["0.weight"]


@pytest.mark.parametrize("only", ["1", "1*", nn.Embedding], ids=str)
@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_computed_weights_of_other_modules_are_refused_when_chosen(how, only):
    layer = nn.Embedding(4, 4)
    layer = parametrized(layer) if how == "parametrized" else prune.l1_unstructured(layer, "weight", 0.5)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(InputError, match=r"parametrization|torch_prune|nothing to prune"):
        sc.weights(model, only=only)
    assert list(sc.weights(model)) == ["0.weight"]


def test_a_parametrized_bias_is_no_obstacle():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", double())
    assert list(sc.weights(nn.Sequential(layer))) == ["0.weight"]


def test_a_scope_is_checked_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), parametrized(nn.Linear(4, 4)))
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match="remove_parametrizations"):
        sc.prune(model, 0.5)
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [kind for kind in COMPUTED if kind != "pruned LSTM"])
def test_they_are_read_as_the_model_computes_them(kind):
    model = nn.Sequential(COMPUTED[kind][0]()).eval()
    if kind == "old spectral_norm":
        model(torch.ones(1, 4))  # computes it at each forward, and is the weight itself up to the first
    name = "0.weight_hh_l0" if "LSTM" in kind else "0.weight"
    read = effective(model) if kind == "pruned" else weights_as_used(model)
    assert torch.equal(read[name], getattr(model[0], name[2:]))


def test_what_is_looked_up_or_beside_the_model_is_not_read_as_a_weight():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].register_parameter("lora_a", nn.Parameter(torch.ones(2, 4)))
    assert [*weights_as_used(model)] == ["1.weight"]
