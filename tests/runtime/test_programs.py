"""Programs: the native steps of a region for each size of image, and what lies around the regions."""

import copy

import pytest
import torch
from torch import nn

from networks_by_hand import Basic, ResNet, lively
from secateur.errors import StateError
from secateur.runtime import graphs, native, products, programs, regions
from sparse_models import off, sparse


def program(module):
    graph = graphs.trace(module)
    return programs.Program(module, graph, [*regions.regions(graph, module)])


def net(*layers):
    model = lively(nn.Sequential(*layers))
    return model, program(sparse(model))


@pytest.mark.parametrize("settings", [
    {}, {"stride": 2}, {"stride": (1, 3), "padding": (2, 0)}, {"dilation": 2, "padding": 2}, {"groups": 4},
    {"padding": "same"}, {"padding": "same", "dilation": 2}, {"padding": "valid", "bias": False},
])  # fmt: skip
def test_settings_of_convolutions(isa, settings):
    model, made = net(nn.Conv2d(4, 8, 3, **settings), nn.ReLU6(), nn.Conv2d(8, 4, (1, 2), padding=(0, 1)))
    x = torch.randn(2, 4, 11, 9)
    assert off(made.run(x, made.bound()), model.double()(x.double()).detach()) <= 1e-5


POOLS = {
    "maxima": nn.MaxPool2d(2), "odd maxima": nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "spread maxima": nn.MaxPool2d(3, dilation=2, padding=1), "averages": nn.AvgPool2d(3, 2, 1),
    "uncounted": nn.AvgPool2d(3, 2, 1, count_include_pad=False), "all": nn.AdaptiveAvgPool2d(1),
    "norm": nn.BatchNorm2d(8), "plain norm": nn.BatchNorm2d(8, affine=False),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_what_is_between(name):
    x = torch.randn(3, 4, 12, 10)
    for around in ((), (nn.ReLU(),), (nn.BatchNorm2d(8), nn.ReLU6())):
        between = copy.deepcopy([POOLS[name], *around, *around[:1]])
        model, made = net(nn.Conv2d(4, 8, 3), *between, nn.Conv2d(8, 4, 1))
        expected = copy.deepcopy(model).double()(x.double()).detach()
        assert off(made.run(x, made.bound()), expected) <= 1e-5


def test_steps_are_laid_once_for_each_size():
    _, made = net(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    bound, (region,) = made.bound(), made.regions
    steps, size = bound.lay(0, region.steps, (2, 4, 9, 7))
    assert size == (4, 7, 5)
    assert [(s.kind, s.source, s.to, s.add, [*s.shape]) for s in steps] == [
        (0, 0, 1, -1, [2, 4, 9, 7, 3, 3, 1, 1, 0, 0, 1, 1]),
        (0, 1, 2, -1, [2, 8, 7, 5, 1, 1, 1, 1, 0, 0, 1, 1]),
    ]
    assert bound.lay(0, region.steps, (2, 4, 9, 7))[0] is steps
    assert bound.lay(0, region.steps, (2, 4, 9, 8))[1] == (4, 7, 6)


def test_steps_are_not_kept_for_ever_more_sizes():
    made = program(sparse(lively(Basic(4, 4))))
    bound, steps = made.bound(), made.regions[0].steps
    for width in range(1, 300):
        bound.lay(0, steps, (1, 4, 8, width))
    assert len(bound.laid) <= 256


def test_sizes_that_torch_refuses_or_spreads_are_not_laid():
    _, made = net(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1))
    for shape in ((1, 3, 9, 9), (1, 4, 2, 9), (1, 4, 0, 9)):
        assert made.bound().lay(0, made.regions[0].steps, shape) is None

    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.c(x)

    model = lively(Spread())
    made = program(sparse(model))
    x = torch.randn(1, 4, 3, 3)
    assert made.bound().lay(0, made.regions[0].steps, tuple(x.shape)) is None
    assert off(made.run(x, made.bound()), model(x).detach()) <= 1e-6


def test_code_of_its_layers_is_used_for_their_row_classes():
    model = lively(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)))
    fast = sparse(model)
    shape = (1, 16, 14, 14, 3, 3, 1, 1, 1, 1, 1, 1)
    code = fast[0]._codes["weight"] = native.generate(fast[0].packed_weight, shape, run=2)
    made = program(fast)
    x = torch.randn(1, 16, 14, 14)
    steps = made.regions[0].steps
    assert made.bound().lay(0, steps, tuple(x.shape))[0][0].code is None
    code.choices = 1 << products.bucket(196)
    bound = programs.Bound(made.regions)
    laid, _ = bound.lay(0, steps, tuple(x.shape))
    assert [step.code for step in laid] == [code.handle, None]
    assert bound.lay(0, steps, (2, 16, 14, 14))[0][0].code is None
    assert off(made.run(x, bound), model.double()(x.double()).detach()) <= 1e-5


def test_tensors_are_looked_at_each_time():
    model = lively(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    fast = sparse(model)
    made = program(fast)
    bound = made.bound()
    assert made.bound() is bound
    fast[1].bias.data[5] += 1
    assert made.bound() is not bound
    bound = made.bound()
    fast[1].running_mean = fast[1].running_mean  # the same
    assert made.bound() is bound
    assert bound.holds()
    fast[1].double()
    assert made.bound() is None
    fast[1].float()
    assert made.bound() is not None
    fast[0].weight.data.mul_(2)
    with pytest.raises(StateError, match=r"sc\.accelerate"):
        made.bound()


def test_values_are_freed_when_nothing_needs_them():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Basic(4, 4)

        def forward(self, x):
            return torch.tanh(self.block(torch.sigmoid(x))) * 2

    made, x = program(sparse(lively(Long()))), torch.randn(1, 4, 5, 5)
    for bound in (made.bound(), None):  # as one call, and singly
        held, values = [], {made._source: x}
        for entry in made._entries:
            for call in [entry] if bound is not None else getattr(entry, "singly", [entry]):
                call.run(values, bound)
                held.append(len(values))
        assert max(held) <= 2 + (bound is None)
        assert held[-1] == 1


def test_outputs_of_any_form():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ResNet()

        def forward(self, x):
            out = self.net(x)
            return {"out": [out, out.shape[0]], "scale": (out * 2, None)}

    model = lively(Many())
    made, x = program(sparse(model)), torch.randn(2, 3, 32, 32)
    got, expected = made.run(x, made.bound()), model(x)
    assert got["out"][1] == 2
    got["out"].append(3)  # a list of torch.fx would refuse
    got["more"] = got.pop("scale")
    got["scale"] = got.pop("more")
    assert got["scale"][1] is None
    assert off(got["out"][0], expected["out"][0].detach()) <= 1e-6
    assert off(got["scale"][0], expected["scale"][0].detach()) <= 1e-6


def test_tensors_of_one_value_are_looked_at_by_themselves():
    model = lively(nn.Sequential(nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3)))
    fast = sparse(model)
    made = program(fast)
    bound, x = made.bound(), torch.randn(1, 4, 6, 6)
    fast[1].bias = nn.Parameter(fast[1].bias.clone(), requires_grad=False)  # equal
    assert not bound.holds()
    assert off(made.run(x, made.bound()), model(x).detach()) <= 1e-6
