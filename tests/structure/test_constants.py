import pytest
import torch

from secateur.structure.constants import constant, varied


@pytest.mark.parametrize("t", [torch.zeros(3), torch.ones(2, 2), torch.zeros(1), torch.full((4, 1), -2.0)])
def test_constants_get_different_numbers_near_their_own(t):
    assert constant(t)
    new = varied(t, torch.Generator().manual_seed(0))
    assert (new.shape, new.dtype) == (t.shape, t.dtype)
    assert len(new.unique()) == t.numel()
    assert not torch.equal(new, t)
    assert bool((new.sign() == t.sign()).all()) or not t.any()


@pytest.mark.parametrize("t", [torch.arange(3.0), torch.ones(1), torch.zeros(0), torch.zeros(3, device="meta")])
def test_what_is_no_constant(t):
    assert not constant(t)
