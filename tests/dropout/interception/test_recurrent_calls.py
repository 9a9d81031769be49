"""A call of a recurrent layer, taken apart and put together again."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode

from secateur.dropout.interception.recurrent_calls import Recurrence

LAYERS = {
    "LSTM": lambda: nn.LSTM(4, 5, 3, bidirectional=True),
    "GRU": lambda: nn.GRU(4, 5, 2, batch_first=True),
    "RNN": lambda: nn.RNN(4, 5, 2, bias=False),
}


class Seen(TorchFunctionMode):
    """The call of the kernel, and what it gives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.lstm, torch.gru, torch.rnn_tanh):
            self.recurrence, self.result = Recurrence.of(func, args), result
        return result


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_after_layer_is_the_whole(name, packed):
    rows = [torch.randn(n, 4) for n in (5, 3)]
    with Seen() as seen, torch.no_grad():
        LAYERS[name]()(pack_sequence(rows) if packed else torch.randn(2, 5, 4))
    recurrence, axes = seen.recurrence, []

    def between(x, axis):
        axes.append(axis)
        return x

    with torch.no_grad():
        parts, whole = recurrence.with_noise(lambda one: one.result, between), recurrence.result
    for got in (parts, whole):
        for one, right in zip(got, seen.result, strict=True):
            torch.testing.assert_close(one, right)
    assert axes == [0 if packed or name == "GRU" else 1] * (recurrence.layers - 1)
