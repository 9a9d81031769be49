"""A handler is in force while it handles, on this thread, and not longer."""

import pytest
import torch

from secateur.dropout import noise
from secateur.dropout.interception.handlers import DropoutCall, Handler, handling
from secateur.dropout.interception.rules import Dispatcher


class Leaves(Dispatcher):
    """Leaves every dropout alone, and counts."""

    met = 0

    def meet(self, kind, rate, training, shape):
        self.met += 1


def test_handling():
    handler = Leaves()
    with handling(handler):
        assert noise.active(training=False)
        x = torch.ones(4)
        assert torch.nn.functional.dropout(x, 0.5) is x
    assert handler.met == 1
    assert not noise.active(training=False)
    assert torch._C._len_torch_function_stack() == 0


def test_an_error_ends_it():
    with pytest.raises(ValueError, match="its own"), handling(Leaves()):
        raise ValueError("its own")
    assert not noise.active(training=False)
    assert torch._C._len_torch_function_stack() == 0


def test_a_handler_must_say_what_it_meets():
    with pytest.raises(TypeError, match="abstract"):
        Handler()


def test_the_site_of_a_call_is_its_place_in_the_code():
    call = DropoutCall("a", "dropout", 0.5, torch.Size([2]), line=3, position=(4,))
    assert call.site == ("a", 3, "dropout", (4,))
