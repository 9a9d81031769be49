"""secateur.streams: what is read for a selection, and what is refused."""

import math

import pytest
import torch

from secateur import streams
from secateur.errors import InputError
from secateur.support import bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_require_finite_counts(monkeypatch, dtype, bad):
    monkeypatch.setattr(bits, "CHUNK", 8)
    weight = torch.ones(5, 5, dtype=dtype)
    streams.require_finite("fc.weight", weight)
    weight[4, 3] = weight[0, 1] = bad
    nan, inf = (2, 0) if math.isnan(bad) else (0, 2)
    with pytest.raises(InputError, match=rf"fc\.weight holds {nan} NaN and {inf} inf among 25 weights.*nan_to_num_"):
        streams.require_finite("fc.weight", weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_that_overflows_is_no_infinity(dtype):
    real = torch.empty(0, dtype=dtype).real.dtype
    streams.require_finite("w", torch.full((50, 3), torch.finfo(real).max, dtype=dtype))


def test_infinities_that_cancel_are_found():
    with pytest.raises(InputError, match="2 inf"):
        streams.require_finite("w", torch.tensor([math.inf, -math.inf, 1.0]))
