"""secateur.anatomy: which dimension of a weight is what."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from secateur import anatomy
from secateur.anatomy import Layout


def layout_of(module, attribute):
    return anatomy.layout(module, attribute, module._parameters[attribute])


LAYOUTS = {
    "Linear": (Layout(), (5, 3), (5, 3)),
    "convolution": (Layout(), (6, 2, 3, 3), (6, 2, 3, 3)),
    "bias": (Layout("o"), (5,), (5,)),
    "scale": (Layout(""), (), ()),
    "Conv1D": (Layout("io"), (3, 5), (5, 3)),
    "transposed convolution": (Layout("gio", 1), (3, 5, 2), (5, 3, 2)),
    "in groups": (Layout("gio", 2), (6, 4, 2, 3), (8, 3, 2, 3)),
    "experts": (Layout("goi"), (4, 5, 3), (20, 3)),
    "transposed experts": (Layout("gio"), (4, 3, 5), (20, 3)),
    "Bilinear": (Layout("oii"), (5, 3, 2), (5, 6)),
    "heads": (Layout("ioo"), (6, 2, 3), (6, 6)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_outputs_first_and_back(kind):
    layout, stored, want = LAYOUTS[kind]
    tensor = torch.arange(float(torch.Size(stored).numel())).view(stored)
    moved = layout.outputs_first(tensor)
    assert moved.shape == layout.shape(stored) == want
    assert torch.equal(layout.as_stored(moved, stored), tensor)
    assert torch.equal(layout.as_stored(moved.contiguous(), torch.Size(stored)), tensor)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_part_of_a_tensor_is_a_part_of_the_rearranged_one(kind):
    layout, stored, _ = LAYOUTS[kind]
    tensor = torch.arange(torch.Size(stored).numel()).view(stored)
    for cut in range(len(stored)):
        index = [np.arange(1, n) if d == cut else np.arange(n) for d, n in enumerate(stored)]
        part = tensor[np.ix_(*index)]
        found = layout.indices(index, stored)
        if layout.groups and cut == 0:  # its first dimension is none of the rearranged ones
            assert found is None
            continue
        assert torch.equal(layout.outputs_first(tensor)[np.ix_(*found)], layout.outputs_first(part))


LAYERS = {
    "Linear": lambda: nn.Linear(4, 6),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(4, 6, 1),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d in groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_of_the_layout_is_an_output_of_the_layer(kind):
    layer = LAYERS[kind]()
    nn.init.zeros_(layer.bias)
    layout = layout_of(layer, "weight")
    kernel = anatomy.of(layer).kernel
    x = torch.ones(1, 4, *[5] * kernel)
    outputs = layout.shape(layer.weight.shape)[0]
    assert outputs == 6
    for dead in range(outputs):
        rows = layout.outputs_first(torch.ones_like(layer.weight)).clone()
        rows[dead] = 0
        with torch.no_grad():
            layer.weight.copy_(layout.as_stored(rows, layer.weight.shape))
        y = layer(x).transpose(0, 1).flatten(1)
        assert [bool((row == 0).all()) for row in y] == [i == dead for i in range(6)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_gates(kind):
    layer = kind(3, 5)
    known = anatomy.of(layer)
    name = "weight_ih" if "Cell" in kind.__name__ else "weight_ih_l0"
    assert layout_of(layer, name) == Layout()
    assert layer.get_parameter(name).shape == (known.gates * 5, 3)


def test_a_subclass_is_what_it_is_derived_from():
    class Own(nn.ConvTranspose2d):
        pass

    class Other(Own):
        def forward(self, x):
            return x

    assert layout_of(Other(4, 6, 3, groups=2), "weight") == Layout("gio", 2)
    assert not anatomy.has_own_forward(Own(1, 1, 1))
    assert anatomy.has_own_forward(Other(1, 1, 1))
    assert anatomy.of(nn.ReLU()) is None


def test_family_and_entry():
    class Own(nn.LSTM):
        pass

    assert anatomy.family(Own(1, 1)) == "recurrent"
    assert anatomy.entry(Own) == (nn.LSTM, anatomy.known(nn.LSTM))
    assert anatomy.entry(nn.RNN)[0] is nn.RNN
    assert anatomy.entry(type("Mine", (nn.RNNBase,), {}))[0] is nn.RNNBase
    assert anatomy.family(nn.ReLU()) is None
    assert anatomy.entry(nn.ReLU) == (nn.Module, None)


RANKED = {
    "Linear": lambda: nn.Linear(2, 2),
    "LSTM": lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=1),
    "GRUCell": lambda: nn.GRUCell(2, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "attention of several widths": lambda: nn.MultiheadAttention(4, 2, kdim=3),
}


@pytest.mark.parametrize("kind", RANKED)
def test_ranks_are_the_order_of_torch(kind):
    names = list(RANKED[kind]()._parameters)
    names = [name for name in names if RANKED[kind]()._parameters[name] is not None]
    assert sorted(names, key=anatomy.rank) == names


@pytest.mark.parametrize("name", ["weight_orig", "weight_hh_l0_orig", "weight_g", "original", "lora_A"])
def test_names_that_torch_gives_no_parameter_of_a_layer_have_no_rank(name):
    assert anatomy.rank(name) is None


def named(package, name, shapes, **attributes):
    module = type(name, (nn.Module,), {"__module__": f"{package}.somewhere"})()
    for attribute, shape in shapes.items():
        module.register_parameter(attribute, nn.Parameter(torch.zeros(shape)))
    vars(module).update(attributes)
    return module


def test_types_of_other_packages_go_by_their_names():
    assert layout_of(named("transformers", "Conv1D", {"weight": (2, 3)}), "weight") == Layout("io")
    assert layout_of(named("torch_geometric", "HeteroLinear", {"weight": (2, 3, 4)}), "weight") == Layout("gio")
    dbrx = named("transformers", "DbrxExpertGLU", {"w1": (8, 3), "w2": (8, 3)}, moe_num_experts=2)
    assert layout_of(dbrx, "w1") == Layout()
    assert layout_of(dbrx, "w2").shape((8, 3)) == (6, 4)
    assert anatomy.of(named("elsewhere", "Conv1D", {"weight": (2, 3)})) is None


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("turned", [True, False])
def test_experts_go_by_their_shapes_unless_a_flag_says_it(turned, flag):
    up, down = ((4, 6, 10), (4, 5, 6)) if turned else ((4, 10, 6), (4, 6, 5))
    attributes = {} if flag is None else {"is_transposed": flag}
    experts = named(
        "own", "Experts", {"gate_up_proj": up, "down_proj": down, "gate_up_proj_bias": (4, 10)}, **attributes
    )
    want = turned if flag is None else flag
    assert layout_of(experts, "gate_up_proj") == Layout("gio" if want else "goi")
    assert anatomy.of(experts).dims("down_proj") == ("gio" if want else "goi")
    assert anatomy.of(experts).dims("gate_up_proj_bias") == ""


def test_readers():
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    found = anatomy.readers(model)
    assert found[id(model[0])] is model[0]
    assert found[id(model[1].out_proj)] is model[1]


@pytest.mark.parametrize("widths", [{}, {"kdim": 5}])
def test_attention_has_the_width_of_its_query_whatever_its_outputs(widths):
    layer = nn.MultiheadAttention(12, 3, **widths)
    layer.out_proj.weight = nn.Parameter(torch.zeros(7, 12))
    assert anatomy.sizes(layer, whole_heads=True).items() >= {"embed_dim": 12, "num_heads": 3, "head_dim": 4}.items()


def test_a_lazy_layer_has_the_layout_it_will_have_when_it_has_a_shape():
    assert layout_of(nn.Linear(2, 2), "bias") == Layout("o")
    for groups, kernel in itertools.product((1, 2), (1, 3)):
        assert layout_of(nn.ConvTranspose1d(2, 2, kernel, groups=groups), "weight") == Layout("gio", groups)


def test_normalisations_keep_statistics():
    assert anatomy.keeps_statistics(nn.BatchNorm2d(3))
    assert anatomy.keeps_statistics(nn.InstanceNorm1d(3))
    assert not anatomy.keeps_statistics(nn.LayerNorm(3))
