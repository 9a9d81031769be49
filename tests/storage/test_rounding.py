"""secateur.storage.rounding: whole steps that change the outputs least, beside the nearest ones."""

import re

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration import calibrate
from secateur.calibration.moments import Moments, Piece
from secateur.calibration.solvers.curvature import Curvature
from secateur.calibration.statistics import Statistics
from secateur.errors import InputError, InputTypeError
from secateur.storage.coding import BLOCK, Level, step_of
from secateur.storage.rounding import descend, nearest


def inputs(n, inner, seed=0):
    """Correlated ones: only then do weights make up for each other."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, inner, generator=g) @ torch.randn(inner, inner, generator=g) / inner**0.5


def gram(x):
    return (x.double().mT @ x.double())[None]


def sparse(rows, columns, seed=0, share=0.7):
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=g)
    return weights * (torch.rand(rows, columns, generator=g) > share)


def error(found, wanted, matrix):
    apart = (found - wanted).double()
    return float(((apart @ matrix) * apart).sum())


def test_the_error_is_far_below_that_of_the_nearest_steps():
    weights, h = sparse(30, 100)[None], gram(inputs(4000, 100))
    steps = torch.full_like(weights, 0.8)
    curvature = Curvature(h)
    damped = curvature.matrix * curvature.scale.mT * curvature.scale
    found = [descend(weights, steps, curvature, sweeps) for sweeps in range(4)]
    errors = [error(one, weights, damped.double()) for one in found]
    assert torch.equal(found[0], nearest(weights, steps))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.8 * errors[0]


def test_no_single_step_makes_the_result_better():
    weights, h = sparse(4, 9)[None], gram(inputs(200, 9))
    steps = torch.full_like(weights, 0.7)
    curvature = Curvature(h)
    damped = (curvature.matrix * curvature.scale.mT * curvature.scale).double()
    found = descend(weights, steps, curvature, 30)
    best = error(found, weights, damped)
    for place in (weights != 0).nonzero().tolist():
        for change in (-0.7, 0.7):
            other = found.clone()
            other[tuple(place)] += change
            assert error(other, weights, damped) >= best * (1 - 1e-5)


def test_what_a_step_cannot_hold_stays_and_steps_may_differ():
    weights = sparse(8, 70)
    weights[0, 0], weights[1, 1], weights[2, 2] = float("nan"), float("inf"), 1e9
    steps = torch.full_like(weights, 0.5)
    steps[4:] = 0.25
    found = descend(weights[None], steps[None], Curvature(gram(inputs(300, 70))))[0]
    assert torch.equal(found == 0, (weights == 0) | (found == 0))
    for place in ((0, 0), (1, 1), (2, 2)):
        assert torch.equal(found[place].nan_to_num(), weights[place].nan_to_num())
        steps[place] = weights[place]
    whole = (found / steps).nan_to_num(1.0, 1.0, 1.0)
    assert torch.allclose(whole, whole.round(), atol=1e-5)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 20), nn.Tanh(), nn.Linear(20, 30)
    )


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_outputs_are_closer_at_equal_bytes(tmp_path, step):
    model = convolutional()
    data = torch.randn(2000, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    data = data.cumsum(-1)
    sc.prune(model, 0.5)
    stats = calibrate(model, data[:1000].split(100))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = model(data[1000:])
    apart, sizes = [], []
    for given in (None, stats):
        written = sc.save(model, tmp_path / "m.safetensors", step=step, stats=given)
        state = sc.load(tmp_path / "m.safetensors", verify=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all((state[name] == 0)[before[name] == 0].all() for name in state)
        other = convolutional()
        other.load_state_dict(state)
        apart.append(float((other(data[1000:]) - dense).square().mean().detach()))
        sizes.append(sum(info.stored_bytes for info in written.tensors))
        lost = {info.name: info.error for info in written.tensors if info.error is not None}
        for name, told in lost.items():
            found = float((state[name] - before[name]).norm() / before[name].norm())
            assert told == pytest.approx(found, rel=1e-5)
    assert apart[1] < 0.7 * apart[0]
    assert sizes[1] <= 1.06 * sizes[0]  # of MiniLM a thousandth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_dtype_has_whole_steps_in_the_file(tmp_path, dtype):
    model = nn.Linear(60, 50, bias=False)
    model.weight.data = sparse(50, 60)
    stats = calibrate(model, inputs(500, 60).split(100))
    model.to(dtype)
    model.weight.data[3, 4] = float("inf")
    model.weight.data[5, 6] = 60000.0
    sc.save(model, tmp_path / "m.safetensors", step=0.01, stats=stats)
    found = sc.load(tmp_path / "m.safetensors", verify=True)["weight"]
    step = step_of(model.weight.detach().flatten(), Level("step", 0.01))
    assert found.dtype is dtype
    assert found[3, 4] == float("inf")
    assert abs(float(found[5, 6]) - 60000) <= max(step, 60000 * torch.finfo(dtype).eps)
    usual = found.double()[found.double().abs() < 100]
    codes = usual / step
    assert float((codes - codes.round()).abs().max()) < (0.01 if dtype.itemsize > 2 else 0.5)


def test_a_tensor_of_several_blocks_has_the_step_of_each(tmp_path):
    inner = 64
    rows = BLOCK // inner + 40
    weights = sparse(rows, inner)
    weights[BLOCK // inner :] *= 10
    model = nn.Linear(inner, rows, bias=False)
    model.weight.data = weights
    piece = Piece("weight", 0, rows)
    h = gram(inputs(1000, inner))
    stats = Statistics((Moments((piece,), h, torch.tensor([1000])),), {"weight": weights.shape})
    sc.save(model, tmp_path / "m.safetensors", step=1.0, stats=stats)
    found = sc.load(tmp_path / "m.safetensors")["weight"]
    for part in (slice(0, BLOCK // inner), slice(BLOCK // inner, None)):
        step = step_of(weights[part].flatten(), Level("step", 1.0))
        codes = found[part] / step
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        plain = nearest(weights[part], torch.full_like(weights[part], step))
        assert error(found[part], weights[part], h[0]) < 0.85 * error(plain, weights[part], h[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 20, bias=False)
        self.second = nn.Linear(20, 20, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    stats = calibrate(model, inputs(500, 20).split(100))
    sc.save(model, tmp_path / "m.safetensors", level="tiny", stats=stats)
    found = sc.load(tmp_path / "m.safetensors")
    assert found["first.weight"] is found["second.weight"]
    codes = found["first.weight"] / step_of(model.first.weight.detach().flatten(), Level("step", 0.25))
    assert torch.allclose(codes, codes.round(), atol=1e-4)


def test_tensors_that_read_together_are_rounded_together(tmp_path):
    torch.manual_seed(0)
    model = nn.LSTM(12, 16)
    h = gram(inputs(2000, 28))
    pieces = Piece("weight_ih_l0", 0, 64), Piece("weight_hh_l0", 0, 64)
    shapes = {piece.name: model.get_parameter(piece.name).shape for piece in pieces}
    stats = Statistics((Moments(pieces, h, torch.tensor([2000])),), shapes)
    sc.save(model, tmp_path / "m.safetensors", step=1.0, stats=stats)
    found = sc.load(tmp_path / "m.safetensors")
    weights = [model.get_parameter(name).detach() for name in shapes]
    steps = [torch.full_like(weight, step_of(weight.flatten(), Level("step", 1.0))) for weight in weights]
    wanted, near = torch.cat(weights, 1), torch.cat([*map(nearest, weights, steps)], 1)
    assert error(torch.cat([found[name] for name in shapes], 1), wanted, h[0]) < 0.6 * error(near, wanted, h[0])


@pytest.mark.parametrize(
    ("error_type", "made", "options", "remedy"),
    [
        (InputTypeError, lambda model: model.state_dict(), {"level": "tiny"}, "give the module itself"),
        (InputError, lambda model: model, {}, "give level='small' or step="),
        (InputError, lambda model: model, {"level": "fp16"}, "give level='small' or step="),
        (InputError, lambda model: nn.Linear(3, 4), {"level": "tiny"}, "call sc.calibrate(model, batches)"),
        (InputTypeError, lambda model: model, {"level": "tiny", "stats": {}}, "give what sc.calibrate(model, batches)"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, error_type, made, options, remedy):
    model = nn.Linear(4, 3)
    options = {"stats": calibrate(model, [torch.randn(50, 4)]), **options}
    with pytest.raises(error_type, match=re.escape(remedy)):
        sc.save(made(model), tmp_path / "m.safetensors", **options)
    assert not (tmp_path / "m.safetensors").exists()
