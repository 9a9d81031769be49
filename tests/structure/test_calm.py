from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.structure.calm import calm


def test_calm_leaves_modes_buffers_and_random_numbers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with calm(model, True):
        model(torch.randn(5, 3))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_calm_leaves_what_containers_hold():
    model = nn.Identity()
    model.log, model.last, model.seen, model.known = [1], deque([1, 2], 2), {1}, {"a": 1}
    with calm(model, False):
        model.log.append(2)
        model.last.append(3)
        model.seen.add(2)
        model.known["a"] = 2
    assert (model.log, [*model.last], model.seen, model.known) == ([1], [1, 2], {1}, {"a": 1})


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(0.9),
        lambda w: w.data.add_(1),
        lambda w: w[0].zero_(),
        lambda w: w.__setitem__(0, 1),
        lambda w: w.__imul__(2),
        lambda w: torch.add(w, 1, out=w),
        lambda w: nn.init.normal_(w),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: setattr(w, "data", w * 2),
    ],
)
def test_a_forward_that_writes_into_parameters_is_refused(write):
    model = nn.Linear(3, 3)
    before = model.weight.clone()
    model.register_forward_pre_hook(lambda module, args: write(module.weight) and None)
    with pytest.raises(InputError, match=r"writes into weight, with .*: let it make a new tensor"):
        sc.shrink(model, torch.randn(2, 3), 0.5)
    assert torch.equal(model.weight, before)


def test_an_embedding_with_a_norm_stays():
    model = nn.Sequential(nn.Embedding(5, 8, max_norm=0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before = model[0].weight.clone()
    small = sc.shrink(model, torch.arange(5), 0.5)
    assert torch.equal(model[0].weight, before)
    assert small[1].out_features == 4


def test_what_writes_elsewhere_runs():
    def within(w):
        w.requires_grad_()
        return torch.vmap(lambda row: row.clone().add_(1))(w)

    model = nn.Linear(3, 3)
    with calm(model, False):
        assert torch.equal(within(model.weight), model.weight + 1)


def test_what_a_forward_leaves_on_modules_is_taken_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 2)
            self.state, self.history, self.noise = None, {}, torch.zeros(3)

        def forward(self, x):
            y, state = self.lstm(x, self.state)
            self.state, self.history["y"], self.extra = state, y, y
            self.noise += torch.from_numpy(np.random.rand(3))
            return self.head(y)

    model = Net()
    small = sc.shrink(model, torch.randn(3, 5, 4), 0.5)
    assert small.lstm.hidden_size == 8
    for one in (model, small):
        assert (one.state, one.history, hasattr(one, "extra")) == (None, {}, False)
        assert not one.noise.any()


def test_autocast_is_left_out_of_forwards():
    """It rounds, and remembers weights in half precision, at the size that they had."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.autocast("cpu", torch.bfloat16):
        model(x := torch.randn(4, 6))
        with calm(model, False):
            assert model(x).dtype == torch.float32
        assert model(x).dtype == torch.bfloat16
        assert sc.shrink(model, x, 0.5)[0].out_features == 8


def test_an_interruption_on_the_way_back_does_not_leave_half_of_it():
    class Log(list):
        def clear(self):
            super().clear()
            if not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt("stop")

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model.log = Log([1, 2])
    model.log.stopped = False
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt, match="stop"), calm(model.eval(), True):
        model(torch.randn(5, 3))
    assert model.log == [1, 2]
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
