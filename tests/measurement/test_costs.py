"""secateur.measurement.costs: sizes are told truly, or not at all."""

import io
import warnings

import pytest
import torch
from torch import nn

from secateur.measurement.costs import file_bytes, hides_weights
from secateur.measurement.timing import measure

X = torch.randn(1, 64)


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def dynamic(model=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.Linear, nn.LSTM, nn.GRU}
        return torch.ao.quantization.quantize_dynamic(model or mlp(), kinds, dtype=torch.qint8)


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def traced(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, X)


def frozen(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.script(model))


def repacked(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils import mkldnn

        return mkldnn.to_mkldnn(model)


class WithSparse(nn.Linear):
    def __init__(self):
        super().__init__(64, 4)
        self.register_buffer("zeros", torch.eye(4).to_sparse())


class Kept(nn.Linear):
    """With a state besides tensors, that holds some, or none."""

    def __init__(self, extra):
        super().__init__(64, 4)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


HIDDEN = {
    "quantized": dynamic,
    "a quantized LSTM": lambda: dynamic(nn.Sequential(nn.LSTM(64, 4))),
    "half in half": lambda: nn.Sequential(dynamic(), nn.Linear(4, 4)),
    "quantized and scripted": lambda: scripted(dynamic()),
    "frozen": lambda: frozen(mlp()),
    "mkldnn": lambda: repacked(mlp()),
    "sparse": WithSparse,
    "tensors beside": lambda: Kept({"scale": torch.ones(2)}),
    "bytes": lambda: Kept(io.BytesIO(b"weights")),
}
PLAIN = {
    "eager": mlp,
    "scripted": lambda: scripted(mlp()),
    "traced": lambda: traced(mlp()),
    "exported": lambda: torch.export.export(mlp(), (X,)).module(),
    "bfloat16": lambda: mlp().bfloat16(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HIDDEN)
def test_no_size_is_told_where_weights_are_hidden(kind):
    model = HIDDEN[kind]()
    assert hides_weights(model)
    got = measure(model, X[None], seconds=0.005)  # an LSTM takes steps
    assert (got.file_bytes, got.parameters, got.nonzeros) == (None, None, None)
    lines = [line.split() for line in str(got).splitlines()]
    assert [words[-1] for words in lines if words[:1] in (["parameters"], ["not"], ["dense"])] == ["unknown"] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLAIN)
def test_the_size_of_plain_models_however_they_are_run(kind):
    model = PLAIN[kind]()
    assert not hides_weights(model)
    got = measure(model, X.to(next(model.parameters()).dtype), seconds=0.005)
    assert got.parameters == 64 * 64 + 64 + 64 * 4 + 4
    assert got.file_bytes > got.parameters * next(model.parameters()).element_size()


def test_small_things_beside_tensors_are_left_out():
    assert file_bytes(Kept({"steps": 3, "name": "x", "dtype": torch.int8})) == file_bytes(nn.Linear(64, 4))
    assert file_bytes(Kept({"more": torch.zeros(2)})) is None  # such a file cannot hold it
