"""The one source of randomness: fresh numbers in training, none in eval(), those of a sample under a handler."""

import pytest
import torch

from secateur.dropout import noise
from secateur.errors import InputError, InputTypeError

X = torch.ones(200, 50)


def test_noise_is_active_in_training_and_while_a_model_is_sampled():
    assert noise.active(True)
    assert not noise.active(False)
    token = noise.SAMPLING.set(True)
    try:
        assert noise.active(False)
    finally:
        noise.SAMPLING.reset(token)


@pytest.mark.parametrize("rate", [0, 0.5, 0.999])
def test_a_rate_is_a_float(rate):
    assert noise.require_rate(rate) == float(rate)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_rate_outside_0_and_1(rate):
    with pytest.raises(InputError, match=r"p is .*: give a rate of at least 0 and below 1"):
        noise.require_rate(rate)


@pytest.mark.parametrize("rate", ["0.5", None, True, torch.tensor(0.5)])
def test_a_rate_that_is_no_number(rate):
    with pytest.raises(InputTypeError, match=r"the rate is .*: give a rate, the fraction that is dropped"):
        noise.require_rate(rate, "the rate")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_drops_below_the_rate_and_scales_the_rest(dtype):
    mask = noise.mask_of(torch.tensor([0.0, 0.2499, 0.25, 0.9]), 0.25, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.tensor([0, 0, 4 / 3, 4 / 3], dtype=dtype))


def test_drop_in_training_and_in_eval():
    assert noise.drop(X, 0.3, training=False, kind="a") is X
    torch.manual_seed(0)
    got = noise.drop(X, 0.3, training=True, kind="a")
    assert abs(float((got == 0).double().mean()) - 0.3) < 5 * (0.21 / X.numel()) ** 0.5
    rows = noise.drop(X, 0.3, training=True, kind="a", shape=(200, 1))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_numbers_without_a_handler_follow_the_global_generator():
    torch.manual_seed(0)
    uniform, normal = noise.uniform(X, (3, 4), kind="a", rate=0.1), noise.normal(X, (500,), kind="a")
    torch.manual_seed(0)
    assert torch.equal(noise.uniform(X, (3, 4), kind="a", rate=0.1), uniform)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert 0.8 < normal.std() < 1.2
