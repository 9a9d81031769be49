"""What running a model may change, and how it is put back."""

import pytest
import torch
from torch import nn
from zoo import linear

from secateur.dropout.interception.isolation import Buffers, fresh, require_rest, undisturbed, written
from secateur.errors import InputTypeError, StateError

X = torch.ones(2, 8)


def test_require_rest():
    model = nn.Sequential(linear(), nn.BatchNorm1d(8)).eval()
    require_rest(model)
    model[1].train()
    with pytest.raises(StateError, match=r"1 is in training mode.*call model\.eval\(\) first"):
        require_rest(model)
    with pytest.raises(StateError, match=r"call model\.eval\(\) first"):
        require_rest(model.train())
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Module"):
        require_rest(3)


def test_undisturbed():
    with torch.enable_grad(), undisturbed():
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_fresh_inputs_are_copies_that_tell_what_was_written():
    call = ((X, 2, "a"), {"y": [X]})
    given = fresh(call)
    assert not written(given, call)
    given[1]["y"][0].add_(1)
    assert written(given, call)
    assert (X == 1).all()


def test_buffers_are_put_back():
    model = nn.BatchNorm1d(8)
    buffers, mean = Buffers(model), model.running_mean
    assert not buffers.put_back()
    model.running_mean.add_(1)
    model.num_batches_tracked = torch.tensor(7)
    assert buffers.put_back()
    assert model.running_mean is mean
    assert (mean == 0).all()
    assert model.num_batches_tracked == 0
    assert not buffers.put_back()
