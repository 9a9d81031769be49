"""A78: no old answers after an edit. A79: NaN as dense does. A81: the size of quantized models is true, or None."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.runtime import check_weights, tuning
from secateur.runtime.kernel_plans import Gain
from sparse_models import fake_times, thin

X = torch.randn(2, 64)
EDITS = {
    "data": lambda w: w.data.mul_(2),
    "no_grad": lambda w: w.copy_(w * 2),
    "numpy": lambda w: np.multiply(w.detach().numpy(), 2, out=w.detach().numpy()),
    "storage": lambda w: setattr(w, "data", w.data * 2),
}


@pytest.fixture(autouse=True)
def gaining(monkeypatch):
    """The clock says that sparse is faster: what follows is about results."""
    monkeypatch.setattr(tuning, "_CACHE", {})
    monkeypatch.setattr(tuning, "gain", lambda *_: Gain(2.0, 1.9, 2.1))
    fake_times(monkeypatch, lambda name, bucket: (2.0, 1.0))


def build():
    return thin(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a78_an_edit_gives_an_error_or_the_new_answer(edit, layer):
    fast = sc.accelerate(build(), X)
    with torch.no_grad():
        fast(X)
        EDITS[edit](fast[layer].weight)
    with pytest.raises(sc.SecateurError, match=rf"weights of {layer} (.|\n)*sc\.accelerate\(sc\.dense\(fast\)"):
        fast(X)
    again = sc.accelerate(sc.dense(fast), X)
    assert torch.allclose(again(X), sc.dense(fast)(X), atol=1e-5)


def test_a78_one_weight_is_found_within_as_many_calls_as_documented():
    fast = sc.accelerate(build(), X)
    fast[2].weight.data[5, 7] += 1
    calls = int(
        re.search(r"within ([\d,]+) calls of that layer", Path("docs/inference.md").read_text())[1].replace(",", "")
    )

    def call_often():
        for _ in range(calls):
            fast(X)

    with pytest.raises(sc.SecateurError, match=r"weights of 2 (.|\n)*sc\.accelerate"):
        call_often()
    with pytest.raises(sc.SecateurError, match=r"weights of 2 (.|\n)*sc\.accelerate"):
        check_weights(fast)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a79_check_inputs_gives_what_dense_gives(bad):
    model, x = build(), X.clone()
    x[1, 3] = bad
    fast = sc.accelerate(model, x, check_inputs=True)
    assert fast.plan.sparse
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), atol=1e-5, equal_nan=True)
        assert model(x)[1].isnan().all()
        assert torch.allclose(fast(X), model(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a81_the_size_of_a_quantized_model_is_true_or_none():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    for model in (quantized, torch.jit.script(quantized)):
        got = sc.measure(model, X, seconds=0.005)
        assert got.file_bytes is None or got.file_bytes > file.tell() / 2
        assert got.parameters is None or got.parameters > 64 * 96
