"""Inputs with NaN and infinity: what sparse kernels make of them, and that `check_inputs` gives what dense gives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import secateur as sc
from secateur.runtime import products
from sparse_models import sparse, thin

BAD = [float("nan"), float("inf"), -float("inf")]


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x, mask=None):
        return self.a(x, x, x, attn_mask=mask, need_weights=False)[0]


KINDS = {
    "Linear": (lambda: nn.Linear(16, 32), (3, 16)),
    "chain": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 16)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (2, 4, 3, 8, 8)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 4, stride=2), (2, 4, 8, 8)),
    "LSTM": (lambda: nn.LSTM(16, 8, 2, batch_first=True), (2, 5, 16)),
    "GRU": (lambda: nn.GRU(16, 8, bidirectional=True), (5, 2, 16)),
    "RNN": (lambda: nn.RNN(16, 8, 2), (5, 2, 16)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (2, 16)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (2, 16)),
    "RNNCell": (lambda: nn.RNNCell(16, 8, nonlinearity="relu"), (2, 16)),
    "attention": (Attend, (2, 5, 16)),
}


def careful(model):
    """A copy that is sparse for all inputs that are finite."""
    fast = sparse(model)
    for layer in fast.modules():
        if hasattr(layer, "_checked"):
            layer._checked = True
            layer.choose(products.ALL)
    return fast


def first(out):
    return out[0] if isinstance(out, tuple) else out


def same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_without_it_the_outputs_whose_kept_weights_meet_it_feel_it(backend, rows, bad, sparsity):
    layer = thin(nn.Linear(70, 90), sparsity)
    fast, x = sparse(layer), torch.randn(rows, 70)
    clean, spoiled = fast(x), x.clone()
    spoiled[-1, 3] = bad
    got = fast(spoiled)
    met = torch.zeros_like(got, dtype=torch.bool)
    met[-1] = layer.weight[:, 3] != 0
    assert 0 < met.sum() < 90
    assert (got.isfinite() == ~met).all()
    assert torch.allclose(got[~met], clean[~met], atol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_with_it_dense_decides(isa, kind, bad):
    make, shape = KINDS[kind]
    model = thin(make())
    fast, x = careful(model), torch.randn(shape)
    with torch.inference_mode():
        assert same(first(fast(x)), first(model(x)))
        x[(-1,) * x.dim()] = bad
        assert same(first(fast(x)), first(model(x)))
        assert not first(model(x)).isfinite().all()


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own, of the dense layer
def test_states_of_recurrent_layers_are_looked_at(isa):
    for model in (thin(nn.LSTM(16, 8)), thin(nn.LSTM(16, 8, proj_size=4))):
        fast, x = careful(model), torch.randn(3, 2, 16)
        for spoiled in range(2):
            states = [torch.zeros(1, 2, model.proj_size or 8), torch.zeros(1, 2, 8)]
            states[spoiled][0, 0, 1] = float("nan")
            with torch.inference_mode():
                assert same(fast(x, tuple(states))[0], model(x, tuple(states))[0])


def test_states_of_cells_are_looked_at(isa):
    model = thin(nn.LSTMCell(16, 8))
    fast, x = careful(model), torch.randn(2, 16)
    for spoiled in range(2):
        states = [torch.zeros(2, 8), torch.zeros(2, 8)]
        states[spoiled][0, 1] = float("nan")
        with torch.inference_mode():
            assert same(fast(x, tuple(states))[0], model(x, tuple(states))[0])


def test_a_packed_sequence(isa):
    model = thin(nn.GRU(16, 8))
    x = torch.randn(4, 2, 16)
    x[1, 1, 5] = float("nan")
    packed = pack_padded_sequence(x, [4, 2])
    with torch.inference_mode():
        assert same(careful(model)(packed)[0].data, model(packed)[0].data)


def test_what_comes_to_be_within_the_model(isa):
    model = thin(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
    with torch.no_grad():
        model[0].bias[3] = float("inf")
    with torch.inference_mode():
        x = torch.randn(2, 16)
        assert same(careful(model)(x), model(x))


def test_attention_whose_rows_are_masked_away(isa):
    model, x = thin(Attend()), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.arange(5)[:, None] == 2, -float("inf"))  # softmax of nothing
    with torch.inference_mode():
        assert same(careful(model)(x, mask), model(x, mask))


def test_in_a_graph_too(isa):
    model, x = thin(nn.Sequential(nn.Linear(16, 32))), torch.randn(2, 16)
    program = torch.export.export(careful(model), (x,)).module()
    x[0, 0] = float("nan")
    with torch.inference_mode():
        assert same(program(x), model(x))


def test_under_vmap(isa):
    model, x = thin(nn.Sequential(nn.Linear(16, 32))), torch.randn(3, 2, 16)
    with torch.inference_mode():
        assert same(torch.vmap(careful(model))(x), model(x))


@pytest.mark.parametrize("copied", [lambda fast: fast, copy.deepcopy])
def test_the_verb(sparse_wins, copied):
    model, x = thin(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))), torch.randn(2, 64)
    fast = copied(sc.accelerate(model, x, check_inputs=True))
    assert fast.plan.sparse == ("0", "2")
    assert fast.plan.layers[-1].reason == "each layer looks at its inputs"
    x[1, 7] = float("nan")
    with torch.inference_mode():
        assert same(fast(x), model(x))
    again = sc.accelerate(model, x, check_inputs=True, plan=fast.plan)
    assert again.plan == fast.plan
    with torch.inference_mode():
        assert same(again(x), model(x))


def test_progress_is_shown_when_asked(sparse_wins, capsys):
    model, x = thin(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))), torch.randn(2, 64)
    sc.accelerate(model, [x, x[:1]], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "accelerating" in shown.err
    # two layers are packed; of two examples layers, networks, runs and the whole model are timed
    assert "10/10" in shown.err
    sc.accelerate(model, x)
    assert capsys.readouterr().err == ""
