"""What is surveyed, which sparse kind a layer gets, and what stands against it: by the entries of anatomy.py."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from secateur import anatomy
from secateur.anatomy import Layer
from secateur.runtime import (
    attention,
    candidates,
    cells,
    convolutions,
    linears,
    recurrences,
    semi_structured,
    swapping,
    transformer_layers,
    transposed,
)
from sparse_models import off, sparse, thin

SPARSE = {
    linears.SparseLinear: lambda: nn.Linear(8, 8),
    convolutions.SparseConv1d: lambda: nn.Conv1d(4, 8, 3),
    convolutions.SparseConv2d: lambda: nn.Conv2d(4, 8, 3),
    convolutions.SparseConv3d: lambda: nn.Conv3d(4, 8, 3),
    transposed.SparseConvTranspose1d: lambda: nn.ConvTranspose1d(4, 8, 3),
    transposed.SparseConvTranspose2d: lambda: nn.ConvTranspose2d(4, 8, 3),
    recurrences.SparseLSTM: lambda: nn.LSTM(8, 8, num_layers=2, bidirectional=True, proj_size=3),
    recurrences.SparseGRU: lambda: nn.GRU(8, 8),
    recurrences.SparseRNN: lambda: nn.RNN(8, 8),
    cells.SparseLSTMCell: lambda: nn.LSTMCell(8, 8),
    cells.SparseGRUCell: lambda: nn.GRUCell(8, 8),
    cells.SparseRNNCell: lambda: nn.RNNCell(8, 8),
    attention.SparseMultiheadAttention: lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_each_sparse_kind_takes_its_layers(isa, kind):
    layer = thin(SPARSE[kind]())
    (plan,) = candidates.survey(layer)
    assert (plan.reason, plan.name) == ("", "")
    made = candidates.make_sparse(layer, plan.name)
    assert type(made) is kind
    made.restore()
    assert swapping.Swapped not in type(layer).__mro__


def test_each_registered_kind_is_tried_here():
    assert set(swapping.KINDS) == {*SPARSE, linears.SparseTransposedLinear, semi_structured.SemiStructuredLinear}


def test_the_out_projection_is_the_attentions():
    plans = list(candidates.survey(thin(nn.TransformerEncoderLayer(8, 2, 16))))
    assert [plan.name for plan in plans] == ["self_attn", "linear1", "linear2"]


DENSE = {
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 8, 3),
    "Bilinear": lambda: nn.Bilinear(4, 4, 8),
    "Experts": lambda: Experts(),
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 12))
        self.down_proj = nn.Parameter(torch.randn(4, 6, 8))


@pytest.mark.parametrize("kind", DENSE)
def test_other_kinds_stay_dense(kind):
    (plan,) = candidates.survey(thin(DENSE[kind]()))
    assert plan.reason == f"no sparse kernel for {kind}"


def test_embeddings_norms_and_activations_are_no_candidates():
    model = nn.Sequential(nn.Embedding(9, 4), nn.EmbeddingBag(9, 4), nn.LayerNorm(4), nn.ReLU())
    assert list(candidates.survey(thin(model))) == []


def recurrent_with_a_mask():
    layer = thin(nn.LSTM(8, 8))
    prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    return layer


def adapted():
    layer = thin(nn.Linear(8, 8))
    layer.lora = nn.Linear(8, 8)
    return layer


COMPUTED = {
    "parametrizations.weight.original0": lambda: parametrizations.weight_norm(thin(nn.Linear(8, 8))),
    "weight_orig": lambda: prune.l1_unstructured(thin(nn.Conv2d(4, 8, 3)), "weight", 0.5),
    "weight_hh_l0_orig": recurrent_with_a_mask,
    "lora.bias": adapted,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_stand_against_it(name):
    plan = next(candidates.survey(COMPUTED[name]()))
    assert plan.reason == f"its weights are computed from {name} (by a parametrization, norm or pruning hook)"


REFUSED = {
    "too dense: 0.00 % zeros": lambda: nn.Linear(8, 8),
    "weight is torch.float64 on cpu": lambda: thin(nn.Linear(8, 8)).double(),
    "its class has a forward of its own": lambda: thin(Scaled(8, 8)),
}


class Doubled(nn.GRUCell):
    def forward(self, input, hx=None):
        return 2 * super().forward(input, hx)


class Leaky(nn.RNNCellBase):
    def forward(self, input, hx):
        return 0.5 * hx + 0.5 * (input @ self.weight_ih.T + hx @ self.weight_hh.T).tanh()


def test_recurrent_layers_of_the_users_stay_dense(isa):
    reasons = [plan.reason for plan in candidates.survey(thin(nn.Sequential(Doubled(8, 8), Leaky(8, 8, False, 1))))]
    assert reasons == ["its class has a forward of its own", "no sparse kernel for Leaky"]


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_stands_against_a_layer(reason):
    (plan,) = candidates.survey(REFUSED[reason]())
    assert plan.reason.startswith(reason)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20))

    def forward(self, x):
        return x @ self.weight + self.bias


class OtherwiseTurned(Turned):
    def forward(self, x):
        return x @ self.weight - self.bias


def test_a_type_needs_an_entry_of_anatomy_and_nothing_else(isa, monkeypatch):
    assert list(candidates.survey(thin(Turned()))) == []
    monkeypatch.setitem(anatomy._BY_TYPE, Turned, Layer("linear", {"weight": "io"}))
    layer, x = thin(Turned()), torch.randn(3, 12)
    fast = sparse(layer)
    assert isinstance(fast, linears.SparseTransposedLinear)
    assert off(fast(x), layer(x)) <= 1e-5
    (plan,) = candidates.survey(thin(OtherwiseTurned()))
    assert plan.reason == "its class has a forward of its own"


def test_the_matrices_of_a_layer_are_its_own():
    layer = Experts()
    layer.norm = nn.Linear(3, 3)
    assert [tuple(weight.shape) for weight in candidates.matrices(layer)] == [(4, 8, 12), (4, 6, 8)]
    attended = nn.MultiheadAttention(8, 2, kdim=4)
    assert len(candidates.matrices(attended)) == 4
    normed = parametrizations.spectral_norm(nn.Linear(8, 6))
    assert [tuple(weight.shape) for weight in candidates.matrices(normed)] == [(6, 8)]


def test_zeros_of_several_matrices():
    assert candidates.zeros_of([torch.zeros(2, 3), torch.ones(2, 1)]) == pytest.approx(0.75)
    assert candidates.zeros_of([]) == 0


def test_layers_around_sparse_ones_are_swapped_and_turned_back():
    model = thin(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False))
    candidates.enclose(model)
    assert type(model) is nn.TransformerEncoder
    layer = candidates.make_sparse(model.layers[0].linear1, "layers.0.linear1")
    candidates.enclose(model)
    assert type(model) is transformer_layers.SparseTransformerEncoder
    layer.restore()
    candidates.enclose(model)
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
