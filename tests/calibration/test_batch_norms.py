"""sc.recalibrate: the mean of the batches' statistics, and nothing else of the model."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.demo import digits
from secateur.errors import InputError, InputTypeError


def made():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 36, 6), nn.BatchNorm1d(6))


def batches(n=4, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) * (i + 1) for i in range(n)]


def test_the_mean_over_the_batches():
    model = made().train()
    model[3].eval()
    modes, parameters = [m.training for m in model.modules()], copy.deepcopy(dict(model.named_parameters()))
    state = torch.get_rng_state()
    assert sc.recalibrate(model, batches()) == ["1", "6"]
    seen = [model[0](x) for x in batches()]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[6].momentum) == (0.3, 0.1)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_a_pruned_model_is_judged_by_its_own_statistics():
    """A CNN on the digits, pruned in one shot: most of what it loses are the statistics."""
    data = digits.load()
    images, labels = data.train_images.unsqueeze(1), data.train_labels
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in [(1, 16), (16, 32), (32, 32)]]
    model = nn.Sequential(*(m for block in blocks for m in block), nn.Flatten(), nn.Linear(32 * 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for at in torch.arange(len(images)).repeat(3).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()
    model.eval()

    def right():
        return float((model(data.test_images.unsqueeze(1)).argmax(1) == data.test_labels).double().mean())

    dense = right()
    sc.prune(model, 0.9)
    pruned = right()
    sc.recalibrate(model, images.split(64))
    assert dense > 0.95
    assert right() > pruned + 0.1


@pytest.mark.parametrize(
    "wrong", [[], [torch.full((4, 3, 8, 8), float("nan"))], [torch.randn(2, 3, 8, 8), "x"], [torch.ones(4, 2)]]
)
def test_a_failure_leaves_the_model(wrong):
    model = made().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        (InputError, InputTypeError, RuntimeError), match=r"at least one|NaN or inf|inputs is a str|input to conv2d"
    ):
        sc.recalibrate(model, wrong)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.3


def test_many_batches_in_bf16():
    model, many = made().bfloat16(), [x.bfloat16() for x in batches(600)]
    sc.recalibrate(model, many)
    with torch.no_grad():
        wanted = torch.stack([model[0](x).double().var((0, 2, 3)) for x in many]).mean(0)
    torch.testing.assert_close(model[1].running_var.double(), wanted, rtol=0.02, atol=0)
    assert not model[1]._forward_hooks


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    model, x = Twice(), torch.randn(8, 2)
    sc.recalibrate(model, [x])
    torch.testing.assert_close(model.norm.running_mean, 2 * x.mean(0))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_layers_out_of_reach_are_refused():
    with pytest.raises(InputError, match=r"1, 6 is of torch.jit.*: recalibrate the model before that"):
        sc.recalibrate(torch.jit.script(made()), batches())

    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(Frozen(3))
    with pytest.raises(InputError, match=r"a layer whose train.. keeps it in eval mode has statistics that stay"):
        sc.recalibrate(model, batches())
    assert int(model[0].num_batches_tracked) == 0


def test_layers_that_no_batch_reaches_keep_theirs():
    model = made()
    model.spare = nn.BatchNorm1d(3)
    model.spare.running_mean.fill_(7)
    model.forward = lambda x: nn.Sequential.forward(model[:7], x)
    assert sc.recalibrate(model, batches(), progress=True) == ["1", "6"]
    assert model.spare.running_mean.tolist() == [7, 7, 7]


def test_a_model_without_any():
    assert sc.recalibrate(nn.Linear(3, 3), [torch.randn(2, 3)]) == []


def test_what_is_no_batch():
    with pytest.raises(InputTypeError, match=r"batches is .*an iterable of inputs"):
        sc.recalibrate(made(), {"x": 1})
