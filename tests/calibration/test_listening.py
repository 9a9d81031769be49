"""What weights read is seen wherever they are used."""

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
