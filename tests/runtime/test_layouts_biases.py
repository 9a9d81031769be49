"""Biases and sizes that the kernels were not made for: layers do as the plain ones, and read no other memory."""

import copy

import pytest
import torch
from torch import nn

from secateur.errors import StateError
from secateur.runtime import native, products
from secateur.runtime.chains import SparseSequential, runs
from secateur.runtime.networks import capture, install
from secateur.runtime.siblings import Siblings
from secateur.runtime.swapping import swap
from sparse_models import off, sparse, thin

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")

BIASES = {
    "every other one": lambda n: torch.arange(2.0 * n)[::2],
    "one": lambda n: torch.ones(1),
    "one for all": lambda n: torch.ones(1).expand(n),
    "too short": lambda n: torch.ones(n - 1),
    "too long": lambda n: torch.ones(n + 1),
    "float64": lambda n: torch.ones(n).double(),
    "bfloat16": lambda n: torch.ones(n).bfloat16(),
    "column": lambda n: torch.ones(n, 1),
    "negative": lambda n: torch._neg_view(-torch.ones(n)),
}
X = torch.randn(5, 32)
IMAGES = torch.randn(2, 8, 6, 6)


class First(nn.Module):
    """What a layer gives, or the first of that."""

    def __init__(self, layer, inputs=1):
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x):
        out = self.layer(*[x] * self.inputs)
        return out if isinstance(out, torch.Tensor) else out[0]


def _normed():
    return nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3))


def _in_one_call(model):
    """A sparse copy in which runs and networks are one call for all inputs."""
    fast = sparse(model)
    if not isinstance(fast, nn.Sequential):
        return fast
    if (program := capture(fast)) is not None:
        install(fast, program.words, products.ALL)
    else:
        swap(fast, SparseSequential)
        assert fast.fuse(dict.fromkeys(runs([*fast]), products.ALL))
    return fast


LAYERS = {
    "linear": (First(nn.Linear(32, 64)), "layer.bias", X),
    "run": (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), "0.bias", X),
    "end of a run": (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), "2.bias", X),
    "conv1d": (First(nn.Conv1d(8, 12, 3)), "layer.bias", IMAGES[:, :, 0]),
    "conv2d": (First(nn.Conv2d(8, 12, 3)), "layer.bias", IMAGES),
    "conv3d": (First(nn.Conv3d(8, 12, 3)), "layer.bias", torch.randn(1, 8, 4, 4, 4)),
    "transposed": (First(nn.ConvTranspose2d(8, 12, 3, stride=2)), "layer.bias", IMAGES),
    "network": (nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3)), "2.bias", IMAGES),
    "bias of a norm": (_normed(), "1.bias", IMAGES),
    "weight of a norm": (_normed(), "1.weight", IMAGES),
    "mean of a norm": (_normed(), "1.running_mean", IMAGES),
    "variance of a norm": (_normed(), "1.running_var", IMAGES),
    "lstm": (First(nn.LSTM(32, 16, bidirectional=True)), "layer.bias_ih_l0", X[:, None]),
    "gru": (First(nn.GRU(32, 16)), "layer.bias_hh_l0", X[:, None]),
    "rnn": (First(nn.RNN(32, 16, num_layers=2)), "layer.bias_hh_l1", X[:, None]),
    "lstm cell": (First(nn.LSTMCell(32, 16)), "layer.bias_ih", X),
    "gru cell": (First(nn.GRUCell(32, 16)), "layer.bias_hh", X),
    "attention": (First(nn.MultiheadAttention(32, 4), 3), "layer.in_proj_bias", X[:, None]),
    "end of attention": (First(nn.MultiheadAttention(32, 4), 3), "layer.out_proj.bias", X[:, None]),
}


def _outcome(model, x):
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return type(error)


def assert_as_plain(fast, plain, x):
    """Twice, as the second call may trust what the first has seen."""
    for _ in range(2):
        found, expected = _outcome(fast, x), _outcome(plain, x)
        if isinstance(expected, torch.Tensor):
            assert isinstance(found, torch.Tensor), found
            assert off(found, expected) < 1e-5
        else:
            assert found is expected


def _put(model, path, tensor, as_data):
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    if as_data:
        getattr(module, name).data = tensor
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("as_data", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_biases_give_what_plain_layers_give(kind, as_data):
    model, path, x = LAYERS[kind]
    thin(model, 0.7)
    for make in BIASES.values():
        fast, plain = _in_one_call(model), copy.deepcopy(model)
        assert_as_plain(fast, plain, x)
        owner, _, name = path.rpartition(".")
        other = make(len(getattr(plain.get_submodule(owner), name)))
        try:
            _put(plain, path, other, as_data)
        except RuntimeError:  # torch refuses
            continue
        _put(fast, path, other, as_data)
        assert_as_plain(fast, plain, x)


def test_parts_of_a_bias_in_its_place_are_noticed():
    for kind in ("linear", "run", "network", "bias of a norm"):
        model, path, x = LAYERS[kind]
        thin(model, 0.7)
        for part in (lambda b: b[:1], lambda b: b[:1].expand(len(b)), lambda b: b[: len(b) // 2]):
            fast, plain = _in_one_call(model), copy.deepcopy(model)
            assert_as_plain(fast, plain, x)
            for one in (fast, plain):
                bias = one.get_parameter(path)
                bias.data = part(bias.data)
            assert_as_plain(fast, plain, x)


def test_siblings_with_another_bias_run_each_for_itself():
    layers = [*sparse(thin(nn.Sequential(nn.Linear(32, 16), nn.Linear(32, 16)), 0.7))]
    siblings = Siblings(layers, products.ALL)
    assert siblings.forward(X) is not None
    layers[1].bias = nn.Parameter(torch.ones(1), requires_grad=False)
    assert siblings.forward(X) is None
    layers[1].bias = nn.Parameter(torch.ones(16, device="meta"), requires_grad=False)
    assert siblings.forward(X) is None


def test_a_bias_that_is_to_be_trained_is_an_error():
    for kind in ("linear", "end of a run", "network", "lstm", "gru cell", "attention", "end of attention"):
        model, path, x = LAYERS[kind]
        fast = _in_one_call(thin(model, 0.7))
        fast(x)
        fast.get_parameter(path).requires_grad_()
        with pytest.raises(StateError, match=r"gives no gradients. For inference call"):
            fast(x)
        with torch.no_grad():
            fast(x)


ATTRIBUTES = {
    "linear": [("layer", "out_features", 4), ("layer", "in_features", 4)],
    "run": [("0", "out_features", 4), ("2", "out_features", 4), ("0", "in_features", 4)],
    "conv2d": [("layer", "groups", 4), ("layer", "out_channels", 4), ("layer", "kernel_size", (4, 4))],
    "conv3d": [("layer", "in_channels", 4), ("layer", "kernel_size", (4, 4, 4))],
    "network": [("2", "groups", 4), ("2", "out_channels", 4), ("0", "in_channels", 4), ("0", "kernel_size", (4, 4))],
    "bias of a norm": [("1", "num_features", 4)],
    "lstm": [("layer", "hidden_size", 4), ("layer", "num_layers", 2), ("layer", "bidirectional", False)],
    "gru": [("layer", "hidden_size", 4), ("layer", "bias", False), ("layer", "input_size", 16)],
    "attention": [("layer", "head_dim", 4)],
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_sizes_are_those_of_the_weights_whatever_attributes_say(kind):
    model, _, x = LAYERS[kind]
    thin(model, 0.7)
    for owner, name, value in ATTRIBUTES[kind]:
        fast, plain = _in_one_call(model), copy.deepcopy(model)
        for called_before in (True, False):
            if called_before:
                assert_as_plain(fast, plain, x)
            for one in (fast, plain):
                setattr(one.get_submodule(owner), name, value)
            if isinstance(fast, SparseSequential):
                fast.steps()  # made anew, by what attributes say now
            assert_as_plain(fast, plain, x)


def test_convolutions_of_other_groups_run_dense():
    model = thin(First(nn.Conv2d(8, 12, 3)), 0.7)
    fast, plain = sparse(model), copy.deepcopy(model)
    fast.layer.groups = plain.layer.groups = 2
    assert_as_plain(fast, plain, torch.randn(2, 16, 6, 6))


def test_a_weight_that_is_cut_in_its_place_is_noticed():
    for kind in ("linear", "run", "end of a run"):
        model, path, x = LAYERS[kind]
        fast = _in_one_call(thin(model, 0.7))
        fast(x)
        weight = fast.get_parameter(path.replace("bias", "weight"))
        weight.data = weight.data[:4]
        with pytest.raises(StateError, match="have changed since they were packed"):
            fast(x)


def test_inputs_without_memory_or_with_signs_of_their_own():
    for kind, (model, _, x) in LAYERS.items():
        fast, plain = _in_one_call(thin(model, 0.7)), copy.deepcopy(model)
        assert_as_plain(fast, plain, torch._neg_view(x.clone()))
        if kind in ("linear", "run", "conv1d", "conv2d", "network"):  # recurrent ones of torch read such memory
            assert_as_plain(fast, plain, torch._efficientzerotensor(x.shape))


def test_on_the_meta_device_a_model_does_as_the_plain_one():
    for kind in ("linear", "run"):
        model, _, x = LAYERS[kind]
        fast = _in_one_call(thin(model, 0.7)).to("meta")
        assert fast(x.to("meta")).shape == model(x).shape
