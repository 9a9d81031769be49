"""What is asked of a network beside values: gradients and tangents, which it must not lose."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from networks_by_hand import Basic, as_one, lively
from secateur.errors import StateError
from sparse_models import off

X = torch.randn(2, 3, 32, 32)


def test_gradients_of_what_a_region_is_given_are_not_lost(network_calls):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.scale = Basic(3, 3), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.block(x * self.scale) + self.scale

    fast = as_one(lively(Scaled()))
    fast(X)
    assert len(network_calls) == 1
    fast.scale.requires_grad_()
    with pytest.raises(StateError, match="gives no gradients"):
        fast(X)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # which torch itself network_calls
def test_tangents_are_not_lost(network_calls):
    model = lively(Basic(3, 4))
    found = []
    with torch.no_grad(), forward_ad.dual_level():
        for one in (model, as_one(model)):
            found.append(forward_ad.unpack_dual(one(forward_ad.make_dual(X, torch.ones_like(X)))).tangent)
    assert off(found[1], found[0]) <= 1e-5
    assert not network_calls


def test_gradients_of_a_call_with_other_tensors(network_calls):
    fast = as_one(lively(Basic(3, 4)))

    def loss(weight):
        return torch.func.functional_call(fast, {"bn1.weight": weight}, (X,)).sum()

    with pytest.raises(StateError, match="gives no gradients"):
        torch.func.grad(loss)(fast.bn1.weight.detach())
    assert not network_calls
