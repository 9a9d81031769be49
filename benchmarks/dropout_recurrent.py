"""The cost of recurrent dropout in training: on the fused LSTM, and in a loop over its steps.

    python benchmarks/dropout.py recurrent [--json FILE]

One forward and backward of an LSTM of two layers over 50 steps, over that of the plain fused LSTM in the same round,
all sides in turn, on one thread, after a warm-up; the median is shown, with the smallest and the largest. Two loops put
the same mask on h between their steps: one calls torch.lstm_cell, the other multiplies the inputs of all steps by their
weights at once and writes out the gates. The spread of a second plain LSTM says how far the machine can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.dropout.layers.recurrent import recurrent as put
from timing import in_turn, ratio

STEPS = 50
RATES: dict[str, dict[str, float]] = {
    "plain again": {},
    "hidden": {"hidden": 0.25},
    "weight": {"weight": 0.25},
    "input": {"input": 0.25},
    "all three": {"hidden": 0.25, "weight": 0.25, "input": 0.25},
}


class Loop(nn.Module):
    """An LSTM that goes step by step, with one mask on h for each layer."""

    def __init__(self, lstm: nn.LSTM, rate: float, fused_cell: bool) -> None:
        super().__init__()
        self.lstm, self.rate, self.fused_cell = lstm, rate, fused_cell

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(self.lstm.num_layers):
            names = (f"{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            x = self._layer(x, *(getattr(self.lstm, name) for name in names))
        return x

    def _layer(self, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], self.lstm.hidden_size)
        mask = (torch.rand(self.lstm.hidden_size) >= self.rate) / (1 - self.rate)
        outputs = []
        if self.fused_cell:
            for step in x:
                h, c = torch.lstm_cell(step, (h * mask, c), w_ih, w_hh, b_ih, b_hh)
                outputs.append(h)
            return torch.stack(outputs)
        for step in nn.functional.linear(x, w_ih, b_ih + b_hh):
            i, f, g, o = torch.addmm(step, h * mask, w_hh.T).chunk(4, 1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)


def recurrent(rounds: int = 15) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for hidden, batch in ((64, 8), (256, 16), (256, 32), (512, 16), (512, 32)):
        torch.manual_seed(0)
        x = torch.randn(STEPS, batch, hidden)
        sides: dict[str, Callable[[], Tensor]] = {"plain": _side(nn.LSTM(hidden, hidden, 2), x)}
        for name, rates in RATES.items():
            lstm = nn.LSTM(hidden, hidden, 2)
            if rates:
                put(lstm, **rates)
            sides[name] = _side(lstm, x)
        sides["loop of lstm_cell, hidden"] = _side(Loop(nn.LSTM(hidden, hidden, 2), 0.25, True), x)
        sides["loop written out, hidden"] = _side(Loop(nn.LSTM(hidden, hidden, 2), 0.25, False), x)
        seconds = in_turn(sides, rounds)
        for name in list(sides)[1:]:
            rows.append({"LSTM": f"2 x {hidden}, batch {batch}", "dropout": name, **ratio(seconds, name, "plain")})
    return rows


def _side(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of training, without the optimizer."""

    def train() -> None:
        model.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()

    return train
