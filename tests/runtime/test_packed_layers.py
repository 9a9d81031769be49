"""Several layers in one native call: nothing has changed, or it is noticed."""

import pytest
import torch
from torch import nn

from secateur.errors import StateError
from secateur.runtime import native, products
from secateur.runtime.packed_layers import PackedLayers, disturbed
from sparse_models import sparse, thin

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

X = torch.randn(5, 24)


@pytest.fixture
def layers():
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU("tanh"), nn.Linear(16, 8))
    return PackedLayers([*sparse(thin(model, 0.5))], products.ALL)


def test_they_are_ready_until_something_is_in_the_way(layers):
    first, activation, _ = (own for own in layers._own)
    assert layers._ready(X)
    assert layers._ready(X)
    assert not layers._ready(X.double())
    assert not layers._ready(nn.Parameter(X, requires_grad=False))
    for own, name, value in ((first, "training", True), (first, "forward", len), (activation, "approximate", "none")):
        before = own.get(name)
        own[name] = value
        assert not layers._ready(X)
        own[name] = before
        if before is None:
            del own[name]
    assert layers._ready(X)
    with torch.autocast("cpu"), pytest.warns(match="autocast is on"):
        assert not layers._ready(X)


def test_weights_that_went_elsewhere_are_followed_and_other_ones_an_error(layers):
    layer = layers.layers[1]
    assert layers._ready(X)
    before = layers._addresses
    layer.weight.data = layer.weight.data.clone()
    assert layers._ready(X)
    assert layers._addresses != before
    layer.bias = nn.Parameter(torch.ones(8), requires_grad=False)
    assert layers._ready(X)
    assert layers._biases[1] == layer.bias.data_ptr()
    layer.weight.data *= 2
    with pytest.raises(StateError, match="weights of 2 have changed"):
        layers._ready(X)


def test_hooks_of_all_modules_disturb(layers):
    assert not disturbed(layers._own)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert disturbed(layers._own)
    handle.remove()
    assert not disturbed(layers._own)
