"""All steps of recurrent layers, and one of a cell, on plain tensors: the products behind the layers."""

import pytest
import torch
from torch import nn

from secateur.errors import StateError
from secateur.runtime import native, products, recurrent_products
from sparse_models import off, thin

CELLS = [
    nn.LSTMCell(17, 20),
    nn.GRUCell(17, 20),
    nn.RNNCell(17, 20),
    nn.RNNCell(17, 20, nonlinearity="relu"),
]


def given(kind):
    """Weights and packed weights of a cell, in the order of `KINDS`."""
    cell = thin(CELLS[kind]).requires_grad_(False)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    return weights, [products.pack(weight) for weight in weights[:2]]


@pytest.mark.parametrize("kind", range(4), ids=recurrent_products.KINDS)
def test_a_step_of_a_cell_is_that_of_torch(isa, kind):
    (weights, packed), x, states = given(kind), torch.randn(3, 17), torch.randn(2, 3, 20)
    h, c = states if kind == recurrent_products.LSTM else (states[0], None)
    got = recurrent_products.cell(kind, x, h, c, weights, packed, products.ALL)
    exact = recurrent_products.dense_cell(kind, x, h, c, weights)
    assert (
        off(torch.cat([one for one in got if one is not None]), torch.cat([*exact]) if c is not None else exact) <= 1e-5
    )


@pytest.mark.parametrize("kind", range(4), ids=recurrent_products.KINDS)
def test_a_cell_leaves_to_torch_what_is_not_for_it(isa, kind):
    weights, packed = given(kind)
    x, state = torch.randn(3, 17), torch.randn(3, 20)
    c = state if kind == recurrent_products.LSTM else None

    def left(x=x, h=state, blobs=packed, choices=products.ALL):
        return recurrent_products.cell(kind, x, h, c, weights, blobs, choices) is None

    assert not left()
    assert left(x=torch.randn(3, 16))
    assert left(x=torch.randn(1, 3, 17))
    assert left(h=torch.randn(2, 20))
    assert left(blobs=[packed[0], None])
    assert left(choices=products.ALL & ~(1 << products.bucket(3)))


@pytest.mark.parametrize("kind", range(4), ids=recurrent_products.KINDS)
def test_gates_beyond_float32_are_left_to_torch_where_that_is_asked_for(isa, kind):
    weights, packed = given(kind)
    weights = [*weights[:2], torch.full_like(weights[2], 3e38), torch.full_like(weights[3], 3e38)]
    step = (kind, torch.ones(1, 17), None, None, weights, packed)
    found = recurrent_products.cell(*step, products.ALL | products.CHECKED)
    assert (found is None) == (kind == recurrent_products.KINDS.index("RNN_RELU"))  # the others end at 1


def test_packed_weights_of_another_version_say_what_to_do(isa):
    weights, _ = given(0)
    foreign = [torch.zeros(4096, dtype=torch.uint8)] * 2
    with pytest.raises(StateError, match=r"sc\.accelerate\(sc\.dense\(fast\)"):
        recurrent_products.cell(0, torch.ones(1, 17), None, None, weights, foreign, products.ALL)


@pytest.mark.parametrize("kind", [-1, 4, 1])
def test_the_library_refuses_what_makes_no_sense(isa, kind):
    """A kind that it does not know, and an LSTM's weights as another's."""
    _, packed = given(0)
    x, out = torch.ones(1, 17), torch.empty(2, 20)
    blobs = [one.data_ptr() for one in packed]
    call = (kind, blobs[0], x.data_ptr(), None, blobs[1], 1, None, None, None, None, out[0].data_ptr())
    assert native.library().secateur_cell(*call, None, 1) == -1


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_threads_give_the_same(isa, batch):
    cell = thin(nn.LSTMCell(512, 512)).requires_grad_(False)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    packed, before = [products.pack(weight) for weight in weights[:2]], torch.get_num_threads()
    step = (0, torch.randn(batch, 512), None, None, weights, packed, products.ALL)
    try:
        torch.set_num_threads(1)
        one = recurrent_products.cell(*step)
        torch.set_num_threads(2)
        assert off(torch.cat(recurrent_products.cell(*step)), torch.cat(one)) <= 1e-6
    finally:
        torch.set_num_threads(before)


def test_layers_without_a_kernel_for_this_batch_are_dense(isa):
    layer = nn.RNN(17, 20, nonlinearity="relu").requires_grad_(False)
    x, h = torch.randn(5, 3, 17), torch.randn(1, 3, 20)
    out, last, cells = recurrent_products.recurrent(x, None, h, None, layer._flat_weights, [], False, 3, 0)
    exact = layer(x, h)
    assert out.equal(exact[0])
    assert last.equal(exact[1])
    assert not cells.numel()
