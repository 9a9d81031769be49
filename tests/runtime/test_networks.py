"""Networks of convolutions as one call: the same numbers, and the module's own forward wherever that matters."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import secateur as sc
from networks_by_hand import (
    Basic,
    Bottleneck,
    Dense,
    Inverted,
    PreActivation,
    ResNet,
    UNet,
    as_one,
    efficient,
    lively,
    mobile,
    vgg,
)  # fmt: skip
from secateur.errors import SecateurWarning, StateError
from secateur.measurement.costs import macs
from secateur.runtime import networks, products, swapping
from sparse_models import off, sparse

X = torch.randn(2, 3, 32, 32)


def small():
    return ResNet(widths=(4, 8), depth=1)


MODELS = {
    "ResNet-18": (ResNet, (3, 3, 32, 32), [12]),
    "ResNet-50": (lambda: ResNet(Bottleneck), (1, 3, 32, 40), [16]),
    "MobileNetV2": (mobile, (2, 3, 17, 16), [11]),
    "EfficientNet": (efficient, (2, 3, 17, 16), [23]),
    "MobileNetV3": (lambda: efficient(nn.Hardswish), (1, 3, 16, 16), [23]),
    "VGG": (vgg, (2, 3, 16, 16), [5]),
    "ResNet V2": (PreActivation, (1, 3, 8, 9), [7]),
    "DenseNet": (Dense, (1, 3, 8, 8), [3, 3, 3]),
    "U-Net": (UNet, (1, 3, 8, 8), [2, 3, 3]),
}


@pytest.mark.parametrize("name", MODELS)
def test_is_the_model_that_it_was(isa, network_calls, name):
    make, shape, steps = MODELS[name]
    model, x = lively(make()), torch.randn(shape)
    fast, expected = as_one(model), copy.deepcopy(model).double()(x.double())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            got = fast(x)
        assert off(got, expected) <= 1e-5
        assert not got.requires_grad
    assert network_calls == steps * 3


def test_sizes_that_it_was_not_made_with(network_calls):
    model = lively(small())
    fast = as_one(model)
    for shape in ((1, 3, 33, 47), (5, 3, 24, 24), (2, 3, 1, 1)):
        x = torch.randn(shape)
        assert off(fast(x), copy.deepcopy(model).double()(x.double())) <= 1e-5
        assert off(fast(x.to(memory_format=torch.channels_last)), fast(x)) == 0
    assert len(network_calls) == 9
    assert fast(torch.randn(0, 3, 32, 32)).shape == (0, 5)
    for wrong in (torch.randn(2, 4, 32, 32), torch.randn(3)):
        with pytest.raises(RuntimeError, match=r"channels|Expected"):
            fast(wrong)
    assert len(network_calls) == 9


def test_threads():
    model = lively(small())
    before, fast = torch.get_num_threads(), as_one(model)
    try:
        torch.set_num_threads(2)
        assert off(fast(X), model(X).detach()) <= 1e-5
    finally:
        torch.set_num_threads(before)


def test_other_ways_to_call_are_the_modules_own(network_calls):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Basic(3, 4)

        def forward(self, x, scale=1.0, *, shift=0.0):
            return self.block(x) * scale + shift

    model = lively(Odd())
    fast = as_one(model)
    assert isinstance(fast, networks.SparseNetwork)
    assert off(fast(X), model(X).detach()) <= 1e-6
    assert network_calls == [3]
    assert off(fast(X, 2.0), model(X, 2.0).detach()) <= 1e-6
    assert off(fast(x=X), model(x=X).detach()) <= 1e-6
    assert off(fast(X, shift=1.0), model(X, shift=1.0).detach()) <= 1e-6
    assert network_calls == [3]


def test_two_inputs_leave_the_blocks(network_calls):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Basic(3, 4), nn.Sequential(Basic(3, 4), Inverted(4, 4))

        def forward(self, x, y):
            return self.one(x) + self.other(y) if x.sum() > y.sum() else self.one(y) - self.other(x)

    model = lively(Two())
    fast = as_one(model)
    assert [name for name, m in fast.named_modules() if isinstance(m, networks.SparseNetwork)] == ["one", "other"]
    assert off(fast(X, -X), model(X, -X).detach()) <= 1e-6
    assert network_calls == [3, 6]


def test_methods_that_forward_is_made_of(network_calls):
    class Timm(ResNet):
        def forward_features(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

        def forward(self, x, pre_logits: bool = False):
            x = self.forward_features(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
            x = self.avgpool(x).flatten(1)
            return x if pre_logits else self.fc(x)

    model = lively(Timm())
    fast = as_one(model)
    assert off(fast(X), model(X).detach()) <= 1e-6
    assert network_calls == [12]
    assert off(fast(X, True), model(X, True).detach()) <= 1e-6
    maps = torch.randn(2, 8, 9, 9)
    assert off(fast.forward_features(maps), model.forward_features(maps).detach()) <= 1e-6
    assert network_calls == [12]


def test_inputs_are_left_alone_or_changed_as_before(network_calls):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Basic(3, 3)

        def forward(self, x):
            x.mul_(2)
            return self.block(x)

    x = X.clone()
    as_one(lively(Basic(3, 3)))(x)
    assert x.equal(X)
    as_one(lively(Changing()))(x)
    assert x.equal(2 * X)
    assert len(network_calls) == 2


def test_nan_goes_where_it_did(network_calls):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)))
    with torch.no_grad():
        model[0].bias[1] = float("nan")
        model[2].weight[0, 1], model[2].weight[2, 1] = 1, 0
    singly, at_once = sparse(model)(X), as_one(model)(X)
    assert network_calls == [3]
    assert singly.isnan().any()
    torch.testing.assert_close(at_once, singly, equal_nan=True)


# ---- what is not as it was traced -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stages.0", "stages.0.0.conv1", "stages.1.0.downsample.1", "relu", "fc"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(network_calls, place, kind):
    fast, seen = as_one(lively(ResNet(depth=1))), []
    expected = fast(X)
    handle = getattr(fast.get_submodule(place), kind)(lambda module, *_: seen.append(module))
    assert off(fast(X), expected) <= 1e-6
    assert fast.get_submodule(place) in seen
    assert len(network_calls) == 1
    handle.remove()
    fast(X)
    assert len(network_calls) == 2


def test_hooks_of_all_modules_and_of_its_own(network_calls):
    fast, seen = as_one(lively(Basic(3, 4))), []
    expected = fast(X)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert off(fast(X), expected) <= 1e-6
    finally:
        handle.remove()
    assert len(seen) == 10
    fast.register_forward_hook(lambda module, args, out: out * 0)
    for _ in range(3):
        assert not fast(X).any()
    assert len(network_calls) == 3


def test_a_forward_of_an_instance_is_called(network_calls):
    fast = as_one(lively(small()))
    fast.stages[0].forward = torch.zeros_like
    assert off(fast(X), fast.plain.forward(fast, X)) == 0
    assert not network_calls


def test_training_is_the_modules_own_affair(network_calls):
    fast = as_one(lively(small()))
    fast.stages[1][0].bn2.train()
    assert off(fast(X), fast.plain.forward(fast, X)) <= 1e-6
    fast.train()
    with pytest.raises(StateError, match=r"fast\.eval\(\)"):
        fast(X)
    assert not network_calls
    with pytest.raises(StateError, match="gives no gradients"):
        fast.eval()(X.clone().requires_grad_())
    fast(X)
    assert network_calls == [8]
    fast.bn1.weight.requires_grad_()
    with pytest.raises(StateError, match="gives no gradients"):
        fast(X)
    assert len(network_calls) == 1


class Choice(nn.Module):
    """Reads a setting that may change."""

    def __init__(self):
        super().__init__()
        self.block, self.skip, self.options = Basic(3, 3), True, {"sign": 1}

    def forward(self, x):
        out = self.block(x) + x if self.skip else self.block(x)
        return out if self.options["sign"] > 0 else -out


CHANGES = {
    "attribute": lambda m: setattr(m, "skip", False),
    "in a dict": lambda m: m.options.update(sign=-1),
    "stride": lambda m: setattr(m.block.conv1, "padding", (0, 0)) or setattr(m.block.conv2, "padding", (2, 2)),
    "padded with other than zeros": lambda m: setattr(m.block.conv1, "padding_mode", "circular"),
    "eps": lambda m: setattr(m.block.bn1, "eps", 1.0),
    "module": lambda m: setattr(m.block, "relu", nn.Tanh()),
    "norm": lambda m: setattr(m.block, "bn2", nn.Identity()),
    "gone": lambda m: delattr(m.block, "downsample") or setattr(m.block, "downsample", nn.Conv2d(3, 3, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("warm", [True, False])
def test_changes_of_modules_count_at_once(change, warm):
    model = lively(Choice())
    fast = as_one(model)
    if warm:
        fast(X)
    torch.manual_seed(1)
    CHANGES[change](model)
    torch.manual_seed(1)
    CHANGES[change](fast)
    model.eval()
    fast.eval()
    for _ in range(3):
        assert off(fast(X), model(X).detach()) <= 1e-6


def test_a_setting_that_stays_is_taken_up(network_calls):
    fast = as_one(lively(Choice()))
    fast(X)
    fast.block.bn1.eps = 0.5
    fast(X)
    assert len(network_calls) == 1
    fast(X)
    assert len(network_calls) == 2
    fast.skip = False  # another graph
    for _ in range(3):
        fast(X)
    assert len(network_calls) == 2
    fast.skip = True
    for _ in range(3):
        fast(X)
    assert len(network_calls) == 4


def test_a_setting_that_never_stays_is_not_traced(network_calls, monkeypatch):
    fast = as_one(lively(Choice()))
    fast(X)
    monkeypatch.setattr(networks, "trace", None)
    for i in range(4):
        fast.step = i
        fast(X)
    assert len(network_calls) == 1


# ---- weights, scales and shifts ---------------------------------------------------------------------------------

WEIGHTS = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "in data": lambda layer: layer.weight.data.mul_(2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
    "loaded": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "gone": lambda layer: layer._parameters.pop("weight"),
}


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("warm", [True, False])
def test_changed_weights_are_noticed(change, warm):
    fast = as_one(lively(small()))
    if warm:
        fast(X)
    WEIGHTS[change](fast.stages[1][0].conv2)
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with pytest.raises(StateError, match=r"weights of stages\.1\.0\.conv2 have(.|\n)*sc\.accelerate\(sc\.dense"):
            one(X)


NORMS = {
    "weight": lambda norm: norm.weight.mul_(2),
    "bias by NumPy": lambda norm: norm.bias.numpy().fill(3),
    "mean": lambda norm: norm.running_mean.add_(1),
    "one value of the variance": lambda norm: norm.running_var.data[2].mul_(3),
    "data": lambda norm: setattr(norm.bias, "data", norm.bias.data + 1),
    "replaced": lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight * 3, requires_grad=False)),
    "buffer replaced": lambda norm: setattr(norm, "running_mean", norm.running_mean + 1),
    "none": lambda norm: setattr(norm, "weight", None),
    "reset": lambda norm: norm.reset_running_stats(),
}


@pytest.mark.parametrize("change", NORMS)
def test_norms_are_those_of_the_call(network_calls, change):
    model = lively(small())
    fast = as_one(model)
    before = fast(X)
    with torch.no_grad():
        NORMS[change](model.stages[0][0].bn1)
        NORMS[change](fast.stages[0][0].bn1)
    for _ in range(3):
        got = fast(X)
        assert off(got, model(X).detach()) <= 1e-5
    assert off(got, before) > 1e-4
    assert network_calls[-1:] == [8]


def test_biases_are_those_of_the_call(network_calls):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    fast = as_one(model)
    fast(X)
    for layer in (0, 1):
        for one in (model, fast):
            one[layer].bias.data.add_(1)
        assert off(fast(X), model(X).detach()) <= 1e-6
        for one in (model, fast):
            one[layer].bias = None
        fast(X)
        assert off(fast(X), model(X).detach()) <= 1e-6
    assert len(network_calls) >= 5


def test_trusted_weights_and_checked_ones(network_calls, sparse_wins):
    fast = sc.accelerate(lively(small()), X)
    network_calls.clear()
    fast(X)
    sc.runtime.check_weights(fast)
    sc.runtime.trust_weights(fast)
    fast(X)
    with torch.no_grad():
        fast.stages[0][0].bn1.bias.data.add_(1)
        fast(X)
    assert network_calls == [8] * 3
    fast.stages[0][0].conv1.weight.data.mul_(2)
    fast(X)  # unnoticed, as promised
    fast.stages[0][0].conv1.weight.mul_(2)
    with pytest.raises(StateError, match="changed"):
        fast(X)


def test_moves(network_calls):
    fast = as_one(lively(small()))
    expected = fast(X)
    assert fast.to("cpu").float().share_memory()(X).equal(expected)
    assert network_calls == [8, 8]
    fast.to(memory_format=torch.channels_last)
    assert off(fast(X), expected) <= 1e-6
    assert off(copy.deepcopy(fast).double()(X.double()), expected.double()) <= 1e-5
    fast.to(torch.bfloat16).float()
    with pytest.raises(StateError, match="changed"):
        fast(X)


# ---- what is not plain inference --------------------------------------------------------------------------------


def test_what_is_special_goes_singly(network_calls):
    model = lively(Basic(3, 4))
    fast = as_one(model)
    with torch.no_grad():
        many = torch.randn(3, 2, 3, 8, 8)
        assert off(torch.vmap(fast)(many), torch.stack([model(x) for x in many])) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(SecateurWarning, match="autocast is on"):
            assert fast(X).dtype == torch.bfloat16
        assert macs(fast, ((X,), {})) == macs(model, ((X,), {}))
        fast.choose(1)
        fast(X)
        assert not network_calls
        fast.choose(products.ALL)
        fast(X)
        assert network_calls == [3]


def test_a_slice_of_a_sequential_is_made_of_plain_calls(network_calls):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    fast = as_one(model)
    assert type(fast) is not nn.Sequential
    part = fast[:4]
    assert off(part(X), model[:4](X).detach()) <= 1e-6
    assert type(sc.dense(part)) is nn.Sequential
    assert not network_calls


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_graphs_are_of_the_layers(network_calls):
    model = lively(Basic(3, 4))
    fast = as_one(model)
    fast(X)
    expected = model(2 * X).detach()
    assert off(torch.jit.trace(fast, (X,), check_trace=False)(2 * X), expected) <= 1e-5
    program = torch.export.export(fast, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert off(program.module()(2 * X), expected) <= 1e-5
    assert sum("secateur.conv2d" in str(node.target) for node in program.graph.nodes) == 3
    torch._dynamo.reset()
    assert off(torch.compile(fast, backend="eager", fullgraph=True)(2 * X), expected) <= 1e-5
    assert network_calls == [3]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_as_one_call_too(network_calls, make):
    fast = as_one(lively(small()))
    expected = fast(X)
    one = make(fast)
    assert type(one) is type(fast)
    assert type(one).__name__ == "SparseResNet"
    with torch.inference_mode():
        other = make(fast)  # whose parameters count no versions
        assert other(X).equal(expected)
        assert other(X).equal(expected)
    del fast
    gc.collect()
    assert one(X).equal(expected)
    assert network_calls == [8] * 4
    assert list(one.state_dict()) == list(small().state_dict())
    one.restore()
    assert type(one) is ResNet


def test_a_model_that_is_let_go_is_freed_at_once():
    class Scaled(ResNet):
        def __init__(self):
            super().__init__(widths=(4,))
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.scale

    fast = as_one(lively(Scaled()))
    fast(X)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(fast), weakref.ref(fast.conv1)
        del fast
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


def test_a_shallow_copy_is_looked_at_by_itself(network_calls):
    model = lively(Choice())
    fast = as_one(model)
    fast(X)
    other = copy.copy(fast)
    other.skip = model.skip = False
    for _ in range(3):
        assert off(other(X), model(X).detach()) <= 1e-6
    model.skip = True
    for _ in range(3):
        assert off(fast(X), model(X).detach()) <= 1e-6
    assert len(network_calls) >= 2


def test_a_copy_of_what_is_in_training_waits(network_calls):
    fast = copy.deepcopy(as_one(lively(small())))
    fast.bn1.train()
    fast(X)
    assert not network_calls
    fast.bn1.eval()
    fast(X)
    assert network_calls == [8]


def test_a_copy_that_does_something_else_is_the_modules_own(network_calls):
    fast = copy.deepcopy(as_one(lively(Choice())))
    fast.skip = False
    assert off(fast(X), fast.plain.forward(fast, X)) <= 1e-6
    assert not network_calls


def test_unpickled_where_the_library_is_not(monkeypatch):
    fast = as_one(lively(small()))
    kept, expected = pickle.dumps(fast), fast(X)
    monkeypatch.setattr(swapping.native, "library", lambda: None)
    assert off(pickle.loads(kept)(X), expected) <= 1e-5


def test_threads_of_python_share_a_network():
    model = lively(small())
    fast, results = as_one(model), []
    inputs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(12)]

    def work(some):
        with torch.inference_mode():
            results.extend(off(fast(x), model(x)) for x in some)

    threads = [threading.Thread(target=work, args=(inputs[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert max(results) <= 1e-5


class Copied(Choice):
    """Copies itself in its own way."""

    def __deepcopy__(self, memo):
        return type(self)()


class Asking(Choice):
    """Asks its subclasses for something."""

    def __init_subclass__(cls, *, reason):
        cls.reason = reason


@pytest.mark.parametrize("kind", [Copied, Asking])
def test_classes_that_cannot_be_swapped(kind):
    module = kind().eval()
    module.block = sparse(lively(module.block))
    assert [name for name, _ in networks.networks(module)] == ["block"]
    assert type(module) is kind


@pytest.mark.parametrize("kind", [Basic, ResNet, nn.BatchNorm2d])  # of a block, of the whole, and of a leaf
def test_another_forward_of_a_class_is_noticed(network_calls, monkeypatch, kind):
    model = lively(small())
    fast = as_one(model)
    assert off(fast(X), model(X).detach()) <= 1e-5
    assert len(network_calls) == 1
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: before(self, x) * 2)
    assert off(fast(X), model(X).detach()) <= 1e-5
