"""Sparse LSTMCell, GRUCell and RNNCell: every kind of input and state, and graphs that hold them."""

import copy
import re

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.runtime import native, products
from sparse_models import off, sparse, thin

CELLS = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
    "RNNCell, ReLU": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


BUILT = pytest.mark.skipif(native.library() is None, reason="no native library")


@pytest.fixture(params=CELLS)
def make(request):
    return CELLS[request.param]


def states(cell, *batch):
    h, c = torch.randn(2, *batch, cell.hidden_size)
    return (h, c) if isinstance(cell, nn.LSTMCell) else h


def double(nest):
    return tuple(map(double, nest)) if isinstance(nest, tuple) else nest.double()


def flat(out):
    return torch.cat(out) if isinstance(out, tuple) else out


def check(cell, x, *hx):
    """Equal to float64, with inputs and states left as they are."""
    before = copy.deepcopy((x, *hx))
    with torch.inference_mode():
        got, exact = sparse(cell)(x, *hx), copy.deepcopy(cell).double()(*map(double, (x, *hx)))
    assert isinstance(got, tuple) == isinstance(exact, tuple)
    assert off(flat(got), flat(exact)) <= 1e-5
    assert all(flat(one).equal(flat(old)) for one, old in zip((x, *hx), before, strict=True))


@pytest.mark.parametrize("batch", [(), (1,), (2,), (4,), (7,), (9,), (33,)], ids=str)
def test_batches(isa, make, batch):
    cell = thin(make(33, 64))
    check(cell, torch.randn(*batch, 33), states(cell, *batch))


@pytest.mark.parametrize("batch", [(), (1,), (20,)], ids=str)
def test_states_that_are_not_given_are_zeros(isa, make, batch):
    check(thin(make(17, 19)), torch.randn(*batch, 17))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 3), (100, 17), (64, 128)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_sizes_and_patterns(isa, make, sizes, sparsity):
    cell = thin(make(*sizes), sparsity)
    check(cell, torch.randn(3, sizes[0]), states(cell, 3))


@pytest.mark.parametrize("batch", [(), (3,), (20,)], ids=str)
def test_without_bias(isa, make, batch):
    cell = thin(make(17, 19, bias=False))
    check(cell, torch.randn(*batch, 17), states(cell, *batch))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (20,)], ids=str)
def test_a_dense_input_matrix_is_not_packed(isa, make, bias, batch):
    cell = thin(make(17, 64, bias=bias), 0.95)
    nn.init.normal_(cell.weight_ih)
    assert list(sparse(cell)._buffers) == ["packed_weight_hh"]
    check(cell, torch.randn(*batch, 17), states(cell, *batch))


@BUILT
def test_not_contiguous(make):
    cell = thin(make(17, 19))
    turned = torch.randn(2, 19, 3).transpose(1, 2)
    check(cell, torch.randn(17, 3).t(), tuple(turned) if isinstance(cell, nn.LSTMCell) else turned[0])


def test_frame_by_frame_as_the_whole_sequence(isa):
    cell, layer = thin(nn.LSTMCell(17, 32)), nn.LSTM(17, 32)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    frames, fast, state, outs = torch.randn(30, 1, 17), sparse(cell), None, []
    with torch.inference_mode():
        for frame in frames:
            state = fast(frame, state)
            outs.append(state[0])
        assert off(torch.stack(outs), layer(frames)[0]) <= 1e-5


@BUILT
def test_what_torch_refuses_is_refused(make):
    cell = thin(make(17, 19))
    fast, state = sparse(cell), states(cell, 3)
    for x, hx in (
        (torch.randn(3, 16), None),
        (torch.randn(2, 3, 17), None),
        (torch.randn(()), None),
        (torch.randn(4, 17), state),
        (torch.randn(17), state),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r".+") as plain:
            cell(x, hx)
        with pytest.raises((RuntimeError, ValueError), match=re.escape(str(plain.value))):
            fast(x, hx)


def of_states(cell):
    """What may be given for states, by mistake or not."""
    one = torch.randn(3, 19)
    stacked = [torch.randn(n, 3, 19) for n in (1, 2, 3)]
    nested = [(), (one,), [one, one], (one,) * 3, (None, one), (one, None), (None, None), {0: one, 1: one}]
    return [one, *stacked, *nested, 0, "ab", one.numpy()]


@BUILT
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_states_of_another_kind_are_for_torch(make, grad, compiling, monkeypatch):
    cell = thin(make(17, 19)).requires_grad_(False)
    fast, x = sparse(cell), torch.randn(3, 17)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.set_grad_enabled(grad):
        for hx in of_states(cell):
            try:
                plain = cell(x, hx)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                if compiling and isinstance(hx, torch.Tensor):
                    continue  # the operator, too, says what is wrong
                with pytest.raises(type(error), match=re.escape(str(error))):
                    fast(x, hx)
            else:
                assert off(flat(fast(x, hx)), flat(plain)) <= 1e-5


@BUILT
def test_an_empty_batch(make):
    assert flat(sparse(thin(make(17, 19)))(torch.randn(0, 17))).shape == (0, 19)


@BUILT
def test_choices_go_by_batch(make):
    cell = thin(make(17, 19))
    fast, x = sparse(cell), torch.randn(3, 17)
    assert (fast.rows(x), fast.rows(x[0])) == (3, 1)
    fast._buffers["packed_weight_hh"] = products.pack(torch.zeros_like(cell.weight_hh))  # shows which kernel ran
    fast._choices = 1 << products.bucket(1)
    with torch.inference_mode():
        assert flat(fast(x, states(cell, 3))).shape == flat(cell(x, states(cell, 3))).shape
        given = states(cell, 3)
        assert flat(fast(x, given)).equal(flat(cell(x, given)))
        one = states(cell)
        assert not torch.allclose(flat(fast(x[0], one)), flat(cell(x[0], one)))


@BUILT
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of the dense cell
def test_under_vmap_it_is_dense(make):
    cell, x = thin(make(17, 19)), torch.randn(4, 2, 17)
    with torch.no_grad():
        if isinstance(cell, nn.LSTMCell):  # torch itself cannot
            with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::lstm_cell"):
                torch.vmap(sparse(cell))(x)
        else:
            assert off(torch.vmap(sparse(cell))(x), cell(x.flatten(0, 1)).view(4, 2, 19)) <= 1e-5


@BUILT
def test_states_that_want_gradients_are_refused(make):
    cell = thin(make(17, 19))
    given = states(cell, 3)
    flat(given if isinstance(given, torch.Tensor) else given[0]).requires_grad_()
    with pytest.raises(sc.errors.StateError, match=r"sc\.dense\(fast\)"):
        sparse(cell)(torch.randn(3, 17), given)


class Stream(nn.Module):
    """A cell over some frames: [frames, batch, features], or [frames, features]."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, frames):
        state = None
        for frame in frames.unbind():
            state = self.cell(frame, state)
        return state


@BUILT
@pytest.mark.parametrize("shape", [(3, 17), (3, 2, 17)], ids=str)
def test_compiled_and_exported(make, shape):
    torch._dynamo.reset()
    model, frames = thin(Stream(make(17, 19))), torch.randn(shape)
    fast = sparse(model)
    program = torch.export.export(fast, (frames,))
    assert sum("secateur.cell" in str(node.target) for node in program.graph.nodes) == 3
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for one in (program.module(), compiled):
            assert off(flat(one(frames)), flat(model(frames))) <= 1e-5


@BUILT
@pytest.mark.parametrize("choices", [0, products.ALL])
@pytest.mark.parametrize("dense_input", [False, True])
def test_opcheck(make, choices, dense_input):
    fast = sparse(thin(make(8, 16)))
    given = states(fast, 3)
    h, c = given if isinstance(given, tuple) else (given, None)
    weights = [fast.weight_ih, fast.weight_hh, fast.bias_ih, fast.bias_hh]
    blobs = [None if dense_input else fast.packed_weight_ih, fast.packed_weight_hh]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.secateur.cell, (fast._kind(), torch.randn(3, 8), h, c, weights, blobs, choices), test_utils=checks
    )


@BUILT
def test_the_verb(sparse_wins, make):
    model, frames = thin(Stream(make(64, 64))), torch.randn(3, 1, 64)
    fast = sc.accelerate(model, frames)
    assert fast.plan.sparse == ("cell",)
    again = sc.accelerate(model, frames, plan=fast.plan.to_dict())
    half = sc.accelerate(model, frames, values=torch.float16)
    with torch.inference_mode():
        for one, tolerance in ((fast, 1e-5), (again, 1e-5), (half, 1e-3)):
            assert off(flat(one(frames)), flat(model(frames))) <= tolerance
    assert type(sc.dense(fast).cell) is type(model.cell)


def test_without_the_library_it_stays_dense(without_native):
    plan = sc.explain(sc.accelerate(thin(nn.GRUCell(8, 8)), torch.randn(1, 8)))
    assert plan.layers[0].reason == "a recurrent layer needs the native library"
