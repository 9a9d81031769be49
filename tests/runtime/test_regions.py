"""Regions: what they span, and that their steps mean what the forward meant, in place or not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks_by_hand import (
    Basic,
    Bottleneck,
    Dense,
    Inverted,
    PreActivation,
    ResNet,
    UNet,
    by_torch,
    lively,
    mobile,
    vgg,
)  # fmt: skip
from secateur.runtime import graphs, regions
from secateur.runtime.operations import AVERAGES, CONVOLUTION, MAXIMA, NEITHER
from sparse_models import off, sparse


def found_in(module):
    return [*regions.regions(graphs.trace(module), module)]


def shown(steps):
    """Kind, source, what is added, whether there is a norm, and the activation of each step."""
    return [(s.kind, s.source, s.add, s.norm is not None, s.activation) for s in steps]


def played(module, x):
    """The forward of a module by its graph, with the steps of its regions in their places."""
    graph = graphs.trace(module)
    interpreter = torch.fx.Interpreter(torch.fx.GraphModule(module, graph))
    nodes, values, end = [*graph.nodes], {}, 0
    for region in [*regions.regions(graph, module), None]:
        start, behind = region.span if region is not None else (len(nodes), 0)
        for node in nodes[end:start]:
            interpreter.env, interpreter.args_iter = values, iter([x])
            values[node] = interpreter.run_node(node)
        if region is not None:
            out = by_torch(region.steps, values[region.source])
            values.update(dict.fromkeys(region.results, out))
        end = behind
    return values[nodes[-1]]


MODELS = {
    "ResNet-18": (ResNet, (2, 3, 32, 32), [10]),
    "ResNet-50": (lambda: ResNet(Bottleneck), (1, 3, 32, 32), [14]),
    "MobileNetV2": (mobile, (2, 3, 16, 16), [10]),
    "VGG": (vgg, (2, 3, 16, 16), [3]),
    "ResNet V2": (PreActivation, (1, 3, 8, 8), [5]),
    "DenseNet": (Dense, (1, 3, 8, 8), [2, 2, 2]),
    "U-Net": (UNet, (1, 3, 8, 8), [2, 2, 3]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, shape, convolutions = MODELS[name]
    model = sparse(lively(make()))
    assert [len(region.layers) for region in found_in(model)] == convolutions
    with torch.no_grad():
        x = torch.randn(shape)
        assert off(played(model, x), model(x)) <= 1e-6


def test_a_block_is_a_step_for_each_convolution():
    (region,) = found_in(sparse(lively(Basic(4, 4))))
    assert shown(region.steps) == [(CONVOLUTION, 0, -1, True, 1), (CONVOLUTION, 1, 0, True, 1)]
    (region,) = found_in(sparse(lively(Basic(4, 8, 2))))
    assert shown(region.steps) == [
        (CONVOLUTION, 0, -1, True, 1), (CONVOLUTION, 1, -1, True, 0), (CONVOLUTION, 0, 2, True, 1),
    ]  # fmt: skip
    (region,) = found_in(sparse(lively(Inverted(4, 4))))
    assert shown(region.steps)[-1] == (CONVOLUTION, 2, 0, True, 0)
    assert [s[4] for s in shown(region.steps)] == [2, 2, 0]


def test_norms_that_stand_alone_are_steps():
    (region,) = found_in(sparse(lively(PreActivation())))
    kinds = [step.kind for step in region.steps]
    assert kinds == [CONVOLUTION, NEITHER, CONVOLUTION, CONVOLUTION, NEITHER, CONVOLUTION, CONVOLUTION]
    assert [step.add for step in region.steps] == [-1, -1, -1, 1, -1, -1, 4]


class Case(nn.Module):
    """Convolutions a, b, c and a norm, put together as `does` says."""

    def __init__(self, does):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.relu, self.quick = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(inplace=True)
        self.does = does

    def forward(self, x):
        return self.does(self, x)


def changed_after(m, x):
    y = m.a(x)
    z = y
    y += x
    return m.b(z) + y


def changed_while_another_name_is_read(m, x):
    y = m.a(x)
    m.quick(y)
    return m.b(y) + y


def identity_is_another_name(m, x):
    y = m.a(x)
    z = F.dropout(y, training=False)
    y.relu_()
    return m.b(z)


def same_read_twice(m, x):
    y = m.a(x)
    return m.b(m.relu(y)) + y


def doubled(m, x):
    y = m.b(m.a(x))
    return m.relu(y + y)


def scaled_after_a_sum(m, x):
    return m.relu(m.norm(m.b(m.a(x)) + x))


def twice_active(m, x):
    return F.relu6(m.relu(m.b(m.a(x))))


def sum_of_earlier(m, x):
    y = m.a(x)
    z = m.b(y)
    return m.c(z) + y + z


def pooled(m, x):
    y = F.max_pool2d(m.relu(m.a(x)), 3, 2, 1)
    return m.norm(F.avg_pool2d(m.b(y), 2, padding=1, count_include_pad=False)).relu()


def whole(m, x):
    return F.adaptive_avg_pool2d(m.b(m.a(x)), 1).flatten(1)


CASES = [
    changed_after, changed_while_another_name_is_read, identity_is_another_name, same_read_twice, doubled,
    scaled_after_a_sum, twice_active, sum_of_earlier, pooled, whole,
]  # fmt: skip


@pytest.mark.parametrize("does", CASES)
def test_steps_mean_what_was_written(does):
    model = sparse(lively(Case(does)))
    x = torch.randn(2, 4, 6, 5)
    (region,) = found_in(model)
    assert len(region.layers) >= 2
    with torch.no_grad():
        assert off(played(model, x.clone()), model(x.clone())) <= 1e-6


def test_a_larger_step_where_it_is_allowed_alone():
    def steps(does):
        (region,) = found_in(sparse(lively(Case(does))))
        return shown(region.steps)

    assert steps(same_read_twice) == [(0, 0, -1, False, 0), (NEITHER, 1, -1, False, 1), (0, 2, 1, False, 0)]
    assert steps(doubled)[-1] == (NEITHER, 2, 2, False, 1)
    assert steps(scaled_after_a_sum)[-2:] == [(0, 1, 0, False, 0), (NEITHER, 2, -1, True, 1)]
    assert steps(twice_active)[-2:] == [(0, 1, -1, False, 1), (NEITHER, 2, -1, False, 2)]
    assert [s[0] for s in steps(pooled)] == [CONVOLUTION, MAXIMA, CONVOLUTION, AVERAGES]
    assert steps(pooled)[-1][3:] == (True, 1)


def split(m, x):
    y = m.a(x)
    return m.c(m.b(y)), y


def two_of_them(m, x):
    y = m.b(m.a(x))
    z = torch.sigmoid(y)
    return m.b(m.c(z)) * y


def test_what_comes_out_twice_ends_a_region():
    model = sparse(lively(Case(split)))
    (region,) = found_in(model)
    assert region.layers == [model.b, model.c]
    model = sparse(lively(Case(two_of_them)))
    assert [r.layers for r in found_in(model)] == [[model.a, model.b], [model.c, model.b]]
    with torch.no_grad():
        x = torch.randn(1, 4, 5, 5)
        assert off(played(model, x), model(x)) <= 1e-6


NONE = {
    "one convolution": lambda m, x: m.relu(m.a(x)),
    "none between": lambda m, x: m.b(torch.erf(m.a(x))),
    "two inputs": lambda m, x: m.a(x.neg()) + m.b(x.abs()),
    "a product of two images": lambda m, x: m.b(m.a(x) * x),
    "no result": lambda m, x: (m.b(m.a(x)), x)[1],
    "the input comes out": lambda m, x: m.quick(x),
}


@pytest.mark.parametrize("why", NONE)
def test_no_region(why):
    assert found_in(sparse(lively(Case(NONE[why])))) == []


def test_what_comes_in_is_not_changed_in_place():
    model = sparse(lively(Case(lambda m, x: m.b(m.a(m.quick(x))))))
    (region,) = found_in(model)
    assert region.span == (2, 4)
    model = sparse(lively(Case(lambda m, x: x.add_(m.b(m.a(x))))))
    (region,) = found_in(model)
    assert region.span == (1, 3)


def test_a_layer_that_is_not_packed_ends_a_region():
    model = lively(Case(lambda m, x: m.a(m.c(m.b(m.a(x))))))
    nn.init.ones_(model.c.weight)
    model = sparse(model)
    assert [r.layers for r in found_in(model)] == [[model.a, model.b]]
