"""secateur.torch_prune: what torch.nn.utils.prune left behind becomes plain."""

import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from secateur.errors import InputError, InputTypeError, MaskError
from secateur.masks import Masks
from secateur.torch_prune import from_torch_prune, masks_of, plain_state_dict

MODELS = {
    "linear": lambda: nn.Linear(4, 3),
    "no bias": lambda: nn.Linear(4, 3, bias=False),
    "conv, norm": lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.PReLU()),
    "embedding": lambda: nn.Sequential(OrderedDict(inner=nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)))),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "lstm of one": lambda: nn.LSTM(3, 4),
    "gru": lambda: nn.GRU(3, 4, 2, bias=False),
    "cell": lambda: nn.LSTMCell(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "attention of three": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
}


def build(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


def prune_all(model, paths, amount=0.5):
    """Prune the parameters of these names, in this order; a name twice is pruned twice."""
    torch.manual_seed(1)
    for path in paths:
        module, _, leaf = path.rpartition(".")
        prune.random_unstructured(model.get_submodule(module), leaf, amount)


def remove_all(model, paths):
    for path in set(paths):
        module, _, leaf = path.rpartition(".")
        prune.remove(model.get_submodule(module), leaf)


def bits_of(tensor):
    return tensor.detach().contiguous().view(torch.int32)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_parameters_pruned_in_any_order_come_back_as_in_a_fresh_model(data):
    kind = data.draw(st.sampled_from(sorted(MODELS)))
    fresh, theirs, ours = build(kind), build(kind), build(kind)
    names = [name for name, _ in fresh.named_parameters()]
    paths = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2 * len(names)))
    prune_all(theirs, paths)
    prune_all(ours, paths)
    saved = dict(ours.state_dict())
    remove_all(theirs, paths)
    masks = from_torch_prune(ours)

    assert [n for n, _ in ours.named_parameters()] == names
    assert list(ours.state_dict()) == list(fresh.state_dict())
    want = theirs.state_dict()
    for found in (ours.state_dict(), plain_state_dict(saved)):
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
        assert all((bits_of(found[name])[~masks[name]] == 0).all() for name in masks), "-0.0 under a mask"
    assert list(plain_state_dict(saved)) == list(fresh.state_dict())
    assert set(masks) == set(paths)
    assert masks == masks_of(saved)
    assert not any(module._forward_pre_hooks for module in ours.modules())


def test_the_same_parameter_object_on_the_same_memory_stays_in_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    prune_all(model, ["0.weight", "1.weight"])
    masks = from_torch_prune(model)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    model(torch.ones(1, 4)).sum().backward()
    was = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, was)
    masks.apply(model)
    assert not model[0].weight[~masks["0.weight"]].any()


def test_lstm_holds_its_own_parameters_again_and_computes_the_same(monkeypatch):
    flattened = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda rnn: flattened.append(list(rnn._flat_weights)))
    model, x = build("lstm of one"), torch.randn(5, 1, 3)
    prune_all(model, ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
    before = model(x)[0].detach()
    flattened.clear()
    from_torch_prune(model)
    assert [[id(w) for w in held] for held in flattened] == [[id(p) for p in model.parameters()]]
    assert all(held is getattr(model, name) for held, name in zip(model._flat_weights, model._flat_weights_names))
    assert all(isinstance(held, nn.Parameter) for held in model._flat_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x)[0], before)
    model(x)[0].sum().backward()
    assert model.weight_hh_l0.grad is not None


def test_infinity_and_nan_under_the_mask_become_plus_zero():
    for value in (float("inf"), float("nan"), -1.0):
        layer = nn.Linear(2, 1)
        prune.custom_from_mask(layer, "weight", torch.tensor([[0.0, 1.0]]))
        with torch.no_grad():
            layer.weight_orig[0, 0] = value
        plain = plain_state_dict(layer.state_dict())["weight"]
        from_torch_prune(layer)
        assert bits_of(layer.weight)[0, 0] == bits_of(plain)[0, 0] == 0


def test_other_hooks_stay():
    layer = nn.Linear(2, 2)
    calls = []
    layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
    layer.register_forward_hook(lambda module, args, out: calls.append("after"))
    prune.l1_unstructured(layer, "weight", 1)
    prune.l1_unstructured(layer, "bias", 1)
    from_torch_prune(layer)
    assert len(layer._forward_pre_hooks) == 1
    layer(torch.ones(1, 2))
    assert calls == ["before", "after"]


def test_a_custom_parameter_name_stays_last_and_known_ones_keep_their_place():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("causal_mask", torch.ones(2))

    layer = Scaled()
    prune_all(layer, ["bias", "weight", "scale"])
    saved = layer.state_dict()
    from_torch_prune(layer)
    assert list(layer.state_dict()) == ["weight", "bias", "scale", "causal_mask"]
    assert list(plain_state_dict(saved)) == ["weight", "bias", "scale", "causal_mask"]


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return self.mask * weight


class Doubling(Mask):
    def forward(self, weight):
        return 2 * self.mask * weight


def test_masks_as_parametrizations():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    fresh_keys, parameter = list(model.state_dict()), model[0].weight
    first, second = torch.rand(2, 3) > 0.3, (torch.rand(2, 3) > 0.3).float()
    first[0, 0] = False
    parametrize.register_parametrization(model[0], "weight", Mask(first))
    parametrize.register_parametrization(model[0], "weight", Mask(second))
    parametrizations.orthogonal(model[1], "weight")  # another's affair: it stays
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 0] = float("inf")
    saved = model.state_dict()
    masks = from_torch_prune(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is parameter
    assert torch.equal(masks["0.weight"], first & second.bool())
    assert not bits_of(parameter)[~masks["0.weight"]].any()
    assert list(model.state_dict())[:2] == fresh_keys[:2]
    assert parametrize.is_parametrized(model[1])
    plain = plain_state_dict(saved)
    assert list(plain)[:2] == fresh_keys[:2]
    assert torch.equal(plain["0.weight"], parameter)


def test_a_parametrization_that_does_more_than_mask_is_refused():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Doubling(torch.ones(2, 3)))
    with pytest.raises(MaskError, match=r"weight: its parametrizations do more than mask: use .*remove_parametr"):
        from_torch_prune(layer)


def test_tied_parameters():
    def tied():
        model = nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
        model.b.weight = model.a.weight
        return model

    mask = torch.eye(3)
    model = tied()
    prune.custom_from_mask(model.a, "weight", mask)
    prune.custom_from_mask(model.b, "weight", mask)
    assert list(from_torch_prune(model)) == ["a.weight"]
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight != 0, mask.bool())

    for theirs in (None, 1 - mask):
        model = tied()
        prune.custom_from_mask(model.a, "weight", mask)
        if theirs is not None:
            prune.custom_from_mask(model.b, "weight", theirs)
        with pytest.raises(InputError, match=r"a.weight is tied to b.weight\w*, .* untie them"):
            from_torch_prune(model)
        assert "a.weight_orig" in model.state_dict()


def test_a_shared_module_is_made_plain_once():
    shared = nn.Linear(3, 3)
    prune.l1_unstructured(shared, "weight", 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    masks = from_torch_prune(model)
    assert (list(masks), masks.pruned) == (["0.weight"], 3)
    assert masks == Masks.from_zeros({"0.weight": model[2].weight})


def test_wrapped_in_data_parallel_the_names_are_the_models_own():
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", 3)
    assert list(from_torch_prune(nn.DataParallel(layer))) == ["weight"]


@pytest.mark.parametrize("verb", [from_torch_prune, lambda model: plain_state_dict(model.state_dict())])
def test_faults_are_found_before_anything_changes(verb):
    def pruned():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        prune_all(model, ["0.weight", "1.weight"])
        return model

    missing, shapes, soft = pruned(), pruned(), pruned()
    del missing[1]._parameters["weight_orig"]
    shapes[1].weight_mask = torch.ones(3, 2)
    soft[1].weight_mask = torch.full((2, 2), 0.5)
    for model, message in [
        (missing, "either 1.weight_orig or 1.weight_mask is missing: save both"),
        (shapes, r"1.weight: its mask has shape \(3, 2\), its weights \(2, 2\).*save both again"),
        (soft, "1.weight: its mask holds more than zeros and ones.*prune.remove"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(MaskError, match=message):
            verb(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in after)
        assert len(model[0]._forward_pre_hooks) == 1


def test_nothing_pruned_and_wrong_types():
    layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match="nothing in this model is pruned with"):
        from_torch_prune(layer)
    with pytest.raises(InputError, match=r"nothing in this state_dict .* load it as it is"):
        plain_state_dict(layer.state_dict())
    with pytest.raises(InputError, match="nothing in this state_dict"):
        plain_state_dict({"weight_orig": torch.ones(2), "weight_u": torch.ones(2), "causal_mask": torch.ones(2)})
    with pytest.raises(InputTypeError, match="use plain_state_dict"):
        from_torch_prune(layer.state_dict())
    with pytest.raises(InputTypeError, match="use from_torch_prune"):
        plain_state_dict(layer)


def test_a_state_dict_is_left_as_it_was():
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", 3)
    saved = layer.state_dict()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    plain = plain_state_dict(saved)
    plain["weight"].fill_(7.0)
    assert list(saved) == list(before)
    assert all(torch.equal(saved[name], before[name]) for name in saved)
