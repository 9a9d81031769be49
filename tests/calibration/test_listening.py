"""What weights read is seen wherever they are used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.calibration import products as products  # what a listener hears
from secateur.calibration.listening import Listener


@torch.no_grad()
def heard(model, *inputs, masks=(), scope=None):
    """The moments of each weight, by name, after one forward."""
    model.eval()
    listener = Listener((scope or sc.weights(model)).members)
    with listener.forward(masks):
        model(*inputs)
    found = {}
    for one in listener.moments():
        for name in one.names:
            found.setdefault(name, []).append(one)
    return found


def exact(x):
    x = x.detach().double().reshape(-1, x.shape[-1])
    return x.T @ x


def same(moments, x):
    torch.testing.assert_close(moments.gram[0], exact(x), rtol=1e-5, atol=1e-5)
    assert moments.count.tolist() == [x.numel() // x.shape[-1]]


X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


class Custom(nn.Module):
    """A layer of the user's own, which gives its weight to F.linear."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 3
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return F.linear(input=x, weight=self.weight)


def test_linear_layers_and_those_of_the_user():
    model = nn.Sequential(Custom(), nn.Linear(3, 2))
    found = heard(model, X)
    same(found["0.weight"][0], X)
    same(found["1.weight"][0], model[0](X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, words):
        return F.linear(self.table(words), self.table.weight)


def test_a_decoder_that_is_tied_to_an_embedding():
    model, words = Tied(), torch.arange(8).view(2, 4)
    found = heard(model, words, scope=sc.weights(model, only=["table.weight"]))
    same(found["table.weight"][0], model.table(words))


def test_padding_is_left_out():
    real = torch.ones(4, 5, dtype=torch.bool)
    real[1, 2:] = False
    found = heard(nn.Linear(6, 2), X, masks=[real])
    same(found["weight"][0], X[real])


def names(found):
    return sorted({one.names for own in found.values() for one in own})


def test_the_state_and_the_input_of_a_recurrent_module_are_read_side_by_side():
    lstm = nn.LSTM(6, 4, batch_first=True)
    found = heard(nn.Sequential(lstm), X)
    (moments,) = found["0.weight_ih_l0"]
    assert moments is found["0.weight_hh_l0"][0]
    assert moments.names == ("0.weight_ih_l0", "0.weight_hh_l0")
    out = lstm(X)[0]
    before = torch.cat([torch.zeros(4, 1, 4), out[:, :-1]], 1)
    same(moments, torch.cat([X, before], 2))


def test_padding_behind_the_sequences_of_a_recurrent_module():
    lstm = nn.GRU(6, 4, batch_first=True)
    real = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    found = heard(lstm, X, masks=[real])
    assert {one.count.item() for own in found.values() for one in own} == {14}


class Steps(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


@torch.no_grad()
@pytest.mark.parametrize(("cell", "parts"), [(nn.LSTMCell, [16]), (nn.RNNCell, [4]), (nn.GRUCell, [8, 4])])
def test_a_cell_in_a_loop(cell, parts):
    model = Steps(cell(6, 4))
    found = heard(model, X)
    assert names(found) == [("cell.weight_ih", "cell.weight_hh")]
    moments = found["cell.weight_ih"]
    assert [m.pieces[0].stop - m.pieces[0].start for m in moments] == parts
    states, state = [torch.zeros(4, 4)], None
    for step in X.unbind(1):
        state = model.cell(step, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    same(moments[0], torch.cat([X, torch.stack(states[:-1], 1)], 2))
