"""secateur.support.inputs: what a model is called with."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from secateur.errors import InputError, InputTypeError
from secateur.support.inputs import arguments


def test_a_tensor_a_tuple_a_dict_and_a_packed_sequence():
    x = torch.zeros(2)
    packed = pack_sequence([torch.zeros(3, 2)])
    assert arguments(x)[0][0] is x
    assert arguments((x, 3)) == ((x, 3), {})
    assert arguments({"x": x}) == ((), {"x": x})
    assert arguments(packed)[0][0] is packed


@pytest.mark.parametrize("inputs", [[1, 2], None, "x", 3])
def test_anything_else_is_an_error(inputs):
    with pytest.raises(InputTypeError, match="Pass a tensor, a tuple of positional arguments, or a dict"):
        arguments(inputs)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": [x]}])
def test_inputs_without_values_are_refused(wrap):
    with pytest.raises(InputError, match="give tensors on the device of the model"):
        arguments(wrap(torch.zeros(2, device="meta")))


def test_a_list_is_refused_with_what_to_do_about_a_loader():
    with pytest.raises(InputTypeError, match="for batch in loader"):
        arguments([torch.zeros(2)])
