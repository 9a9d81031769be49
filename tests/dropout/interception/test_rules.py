"""Each dropout function of torch is met under its name, with its rate, and what is put in is what comes out."""

import pytest
import torch
from torch.nn import functional as F

from secateur.dropout.interception.handlers import DropoutCall, handling
from secateur.dropout.interception.rules import Dispatcher


class Puts(Dispatcher):
    """Gives random numbers of 0.75: rates below that keep everything."""

    def __init__(self):
        super().__init__()
        self.met = []

    def meet(self, kind, rate, training, shape):
        self.met.append((kind, rate, training, tuple(shape)))
        return DropoutCall("", kind, rate, torch.Size(shape))

    def put(self, call, x, shape, combine, axis=0):
        return combine(x[None], torch.full((1, *shape), 0.75))[0]

    def write(self, x, result):
        return x.copy_(result)


CALLS = {
    "F.dropout": (lambda x: F.dropout(x, 0.5, False), ("dropout", 0.5, False)),
    "torch.dropout": (lambda x: torch.dropout(x, 0.5, True), ("dropout", 0.5, True)),
    "aten": (lambda x: torch.ops.aten.dropout(x, 0.5, False), ("dropout", 0.5, False)),
    "dropout1d": (lambda x: F.dropout1d(x, 0.5, False), ("dropout1d", 0.5, False)),
    "feature_dropout": (lambda x: torch.feature_dropout(x, 0.5, False), ("feature_dropout", 0.5, False)),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_met(name):
    call, right = CALLS[name]
    handler, x = Puts(), torch.ones(2, 3, 4)
    with handling(handler):
        got = call(x)
    assert handler.met == [(*right, (2, 3, 4))]
    assert torch.equal(got, torch.full_like(x, 2.0))


def test_in_place():
    handler, x = Puts(), torch.ones(2, 3)
    with handling(handler):
        got = F.dropout(x, 0.5, False, True)
    assert got is x
    assert (x == 2).all()


def test_attention_is_written_out():
    handler = Puts()
    query, key, value = (torch.randn(2, 3, 4) for _ in range(3))
    with handling(handler):
        got = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.testing.assert_close(got, 2 * F.scaled_dot_product_attention(query, key, value))
    assert handler.met == [("attention", 0.5, True, (2, 3, 3))]


def test_layers_of_an_lstm():
    handler, lstm = Puts(), torch.nn.LSTM(4, 4, 3, dropout=0.5).eval()
    with handling(handler):
        lstm(torch.randn(5, 2, 4))
    assert handler.met == [("lstm", 0.5, False, (5, 2, 4))] * 2
