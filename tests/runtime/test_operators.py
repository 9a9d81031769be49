"""Compiled and exported models hold our operators, without a graph break, for any batch size."""

import io

import pytest
import torch
from torch import nn

from secateur.errors import InputTypeError, StateError
from secateur.runtime import operators, products, recurrent_products
from sparse_models import off, sparse, thin

assert operators


class Mixed(nn.Module):
    """Layers of most kinds; `steps` apart from `features`, as dynamo refuses every nn.LSTM by default."""

    def __init__(self, recurrent=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.signal = nn.Conv1d(8, 8, 3, padding="same")
        self.lstm = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True) if recurrent else None
        self.gru = nn.GRU(16, 16, batch_first=True) if recurrent else None
        self.widen = nn.Linear(8, 16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.signal(self.conv(x).flatten(2)).transpose(1, 2)
        y = self.widen(y) if self.lstm is None else self.gru(self.lstm(y)[0])[0]
        return self.head(self.attend(y, y, y, need_weights=False)[0])


X = torch.randn(2, 3, 8, 8)
MORE = torch.randn(7, 3, 8, 8)


def ours(graph):
    return sorted({str(node.target).split(".")[1] for node in graph.nodes if "secateur" in str(node.target)})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compile(isa, dynamic, mode):
    torch._dynamo.reset()
    model = thin(Mixed(recurrent=False), 0.6)
    compiled = torch.compile(sparse(model), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with mode():
        for x in (X, MORE):
            assert off(compiled(x), model(x).detach()) <= 1e-5


def test_compile_with_recurrent_layers(isa):
    torch._dynamo.reset()
    model = thin(Mixed(), 0.6)
    compiled = torch.compile(sparse(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        for x in (X, MORE):
            assert off(compiled(x), model(x)) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compile_with_inductor(isa):
    torch._dynamo.reset()
    model = thin(Mixed(recurrent=False), 0.6)
    with torch.no_grad():
        assert off(torch.compile(sparse(model), fullgraph=True)(X), model(X)) <= 1e-5


def test_export(isa):
    model = thin(Mixed(), 0.6)
    fast = sparse(model)
    program = torch.export.export(fast, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert ours(program.graph) == ["conv2d", "linear", "recurrent"]
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    with torch.no_grad():
        for one in (program.module(), torch.export.load(kept).module()):
            for x in (X, MORE):
                assert off(one(x), model(x)) <= 1e-5
        assert off(fast(X), model(X)) <= 1e-5  # and the model is as before


def test_gradients_are_refused(isa):
    torch._dynamo.reset()
    compiled = torch.compile(sparse(thin(nn.Linear(16, 8))), fullgraph=True, backend="eager")
    out = compiled(torch.randn(4, 16, requires_grad=True))
    with pytest.raises(StateError, match=r"sc\.dense\(fast\)"):
        out.sum().backward()


def test_autocast_in_a_graph_is_dense(isa):
    torch._dynamo.reset()
    model = thin(Mixed(recurrent=False), 0.6)
    compiled = torch.compile(sparse(model), backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert compiled(X).dtype is torch.bfloat16


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(isa, batch):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    linear, conv = thin(nn.Linear(16, 8)), thin(nn.Conv2d(4, 8, 3))
    weight = linear.weight.detach()
    given = (torch.randn(batch, 16), weight, products.pack(weight), linear.bias.detach(), products.ALL)
    torch.library.opcheck(torch.ops.secateur.linear, given, test_utils=checks)
    weight = conv.weight.detach()
    given = (torch.randn(batch, 4, 6, 6), weight, products.pack(weight.flatten(1)), None, (1, 1), (1, 1), (1, 1), 1)
    torch.library.opcheck(torch.ops.secateur.conv2d, (*given, products.ALL), test_utils=checks)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("choices", [0, products.ALL])
def test_opcheck_recurrent(isa, kind, choices):
    fast = sparse(thin(kind(8, 16, 2, bidirectional=True)))
    states = fast._zeros(X, 3)
    h, c = (*states, None)[:2]
    given = (torch.randn(5, 3, 8), None, h, c, list(fast._flat_weights), fast._packed(X), True)
    given = (*given, recurrent_products.KINDS.index(fast.mode), choices)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.secateur.recurrent, given, test_utils=checks)


def test_wrong_dtypes_are_refused_before_they_reach_a_pointer(isa):
    fast = sparse(thin(nn.Linear(16, 8)))
    given = (fast.weight, fast.packed_weight, fast.bias, products.ALL)
    with pytest.raises(InputTypeError, match="takes float32"):
        torch.ops.secateur.linear(torch.randn(4, 16).bfloat16(), *given)
