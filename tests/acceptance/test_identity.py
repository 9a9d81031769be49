"""The model stays itself: names, order, identities, storages, hooks, copies, forward."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import secateur as sc
from models import MODELS, LanguageModel, Mlp, Net, Tagger, build, copies, example, k, loss, same, train, zeros


def face(model):
    """All by which others know a model, apart from its numbers."""
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "modules": [id(module) for module in model.modules()],
        "keys": [(name, t.dtype, t.shape, t.stride(), t.data_ptr()) for name, t in model.state_dict().items()],
        "parameters": [
            (name, id(p), type(p), p.requires_grad, p.data_ptr(), p.is_leaf)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def hooks(model):
    return [
        {name: dict(value) for name, value in vars(module).items() if "hook" in name and isinstance(value, dict)}
        for module in model.modules()
    ] + [parametrize.is_parametrized(module) for module in model.modules()]


def through_a_life(kind):
    """Yield a model before, during and after its pruning."""
    model = build(kind)
    yield "before", model
    sc.prune(model, 0.3)
    yield "pruned", model
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    pruner = sc.Pruner(model, 0.9, schedule=lambda step: min(0.3 + 0.2 * step, 0.9))
    pruner.attach(optimizer)
    for step in range(5):
        train(model, optimizer, 1, first=step)
        yield f"step {step}", model
    pruner.finish()
    yield "finished", model


@pytest.mark.parametrize("kind", MODELS)
def test_a01_names_dtypes_and_shapes(kind):
    told = [[(n, t.dtype, t.shape) for n, t in model.state_dict().items()] for _, model in through_a_life(kind)]
    assert all(one == told[0] for one in told)


def test_a02_lstm_optimizer_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(Tagger)
        keys = list(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
        scope = sc.weights(model, only=["lstm"])
        pruner = sc.Pruner(model, 0.9, scope=scope)
        pruner.attach(optimizer)
        train(model, optimizer, 1)
        pruner.finish()
        model.eval()(example(model))
    assert list(model.state_dict()) == keys
    assert len(scope) == 8
    assert scope.size == sum(w.numel() for n, w in model.lstm.named_parameters() if "weight" in n)
    assert zeros(scope) == k(0.9, scope.size)
    assert not caught


@pytest.mark.parametrize("kind", MODELS)
def test_a03_parameters_and_storages(kind):
    faces = [(when, face(model)) for when, model in through_a_life(kind)]
    for when, seen in faces:
        assert seen == faces[0][1], when


def test_a03_flat_weights_of_an_lstm():
    model = build(Tagger)
    flat = [(id(w), w.data_ptr()) for w in model.lstm._flat_weights]
    for when, pruned in through_a_life(Tagger):
        own = dict(pruned.lstm.named_parameters())
        names = pruned.lstm._flat_weights_names
        assert all(w is own[n] for w, n in zip(pruned.lstm._flat_weights, names, strict=True)), when
    sc.prune(model, 0.9)
    assert [(id(w), w.data_ptr()) for w in model.lstm._flat_weights] == flat


@pytest.mark.gpu
def test_a03_flat_weights_share_one_storage():
    model = build(Tagger).cuda()
    x = example(model).cuda()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        pruner = sc.Pruner(model, 0.9)
        pruner.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        pruner.finish()
        model(x)
    assert len({w.untyped_storage().data_ptr() for w in model.lstm._flat_weights}) == 1
    assert not [w for w in caught if "compact" in str(w.message) or "contiguous" in str(w.message)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("after", ["prune", "attach", "forward", "backward"])
def test_a04_deepcopy(kind, after):
    model = build(kind).eval()
    if after == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sc.Pruner(model, 0.8).attach(optimizer)
        train(model, optimizer, 2)
    else:
        sc.prune(model, 0.8)
    if after in ("forward", "backward"):
        value = loss(model)  # kept alive: a graph hangs on the model
        if after == "backward":
            value.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(example(model)), model(example(model)))
    assert same(copies(twin), copies(model))
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", MODELS)
def test_a07_order_of_parameters(kind):
    orders = [[n for n, _ in model.named_parameters()] for _, model in through_a_life(kind)]
    assert all(order == orders[0] for order in orders)


def test_a18_tied_weights():
    model = build(LanguageModel)
    keys, biases = list(model.state_dict()), model.decoder.bias.detach().clone()
    scope = sc.weights(model, only=["decoder.weight"])
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    pruner = sc.Pruner(model, 0.5, scope=scope)
    pruner.attach(optimizer)
    assert torch.equal(model.decoder.bias, biases)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        assert model.decoder.weight is model.embed.weight
        assert int((model.embed.weight == 0).sum()) == int((model.decoder.weight == 0).sum()) == 120
    pruner.finish()
    assert list(model.state_dict()) == keys
    assert scope.size == 240
    assert len(scope) == 1


@pytest.mark.parametrize("chosen", [["embed.weight"], ["decoder.weight"], [nn.Embedding, nn.Linear], ["*"]])
def test_a18_a_tied_weight_goes_by_any_name_and_counts_once(chosen):
    model = build(LanguageModel)
    scope = sc.weights(model, only=chosen)
    tied = [name for name, p in scope.items() if p is model.embed.weight]
    assert len(tied) == 1
    masks = sc.prune(model, 0.5, scope=scope)
    assert masks.pruned == k(0.5, scope.size) == zeros(scope)
    assert model.decoder.weight is model.embed.weight
    plain = build(LanguageModel)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(example(model)), model(example(model)))


def test_a28_frozen_parameters():
    model = build(Tagger)
    model.lstm.requires_grad_(False)
    model.embed.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(start=1, stop=5))
    pruner.attach(optimizer)
    train(model, optimizer, 5)
    pruner.finish()
    scope = sc.weights(model)
    assert any(name.startswith("lstm") for name in scope)
    assert zeros(scope) == k(0.9, scope.size)
    assert int((model.lstm.weight_hh_l0 == 0).sum()) > 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.lstm.parameters())


def test_a28_only_frozen_parameters_in_scope():
    """A frozen body pruned step by step while the head trains: it is done, or refused at once; never left undone."""
    model = build(Tagger)
    model.lstm.requires_grad_(False)
    optimizer = torch.optim.Adam(model.head.parameters())
    scope = sc.weights(model, only=["lstm"])
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(start=1, stop=5), scope=scope)
    try:
        pruner.attach(optimizer)
    except sc.errors.SecateurError:
        return
    train(model, optimizer, 5)
    pruner.finish()
    assert zeros(scope) == k(0.9, scope.size)


@pytest.mark.parametrize("kind", MODELS)
def test_a35_hooks_and_parametrizations(kind):
    seen = [(when, hooks(model)) for when, model in through_a_life(kind)]
    assert any("_forward_pre_hooks" in module for module in seen[0][1][:1])
    for when, now in seen:
        assert now == seen[0][1], when


def test_a37_functional_call():
    model = build(Mlp)
    other = build(Mlp, seed=1)
    masks = sc.prune(model, 0.9)
    x = example(model)
    assert torch.equal(functional_call(model, dict(other.named_parameters()), (x,)), other(x))
    swapped = functional_call(model, {"first.weight": other.first.weight}, (x,))
    assert torch.equal(swapped, model.second(F.linear(x, other.first.weight, model.first.bias).relu()))
    gradient = grad(lambda ws: functional_call(model, ws, (x,)).sum())(dict(model.named_parameters()))
    assert gradient["first.weight"].shape == (20, 12)
    assert not sc.check(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)  # usable afterwards
    assert sc.remask(model, masks).keys() == masks.keys()


def test_a37_vmap_over_an_ensemble():
    models = [build(Mlp, seed) for seed in range(3)]
    for model in models:
        sc.prune(model, 0.9)
    x = example(models[0])
    parameters, buffers = stack_module_state(models)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(together, torch.stack([model(x) for model in models]), atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a37_checkpoint(reentrant):
    model, plain = build(Net), build(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    plain.load_state_dict(model.state_dict())
    x = example(model).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    plain(x).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    optimizer.step()
    pruner.finish()


def test_a38_forward_and_functional_see_the_masked_weights():
    for when, model in through_a_life(Mlp):
        x = example(model)
        by_hand = F.linear(F.linear(x, model.first.weight, model.first.bias).relu(), model.second.weight)
        by_hand = by_hand + model.second.bias
        assert torch.equal(model.forward(x), model(x)), when
        assert torch.allclose(by_hand, model(x), atol=1e-6), when
        first = F.linear(x, model.first.weight, model.first.bias)
        assert torch.equal(model.first(x), first), when
        if when == "finished":
            assert int((model.first.weight == 0).sum() + (model.second.weight == 0).sum()) == k(0.9, 340)


@pytest.mark.parametrize("kind", MODELS)
def test_a49_forward_does_what_the_dense_forward_does(kind):
    """No mask multiply: the same operations in the same order, the same graph behind the output."""

    def operations(model):
        x = example(model)
        model(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(x)
        return [event.name for event in seen.events()]

    def graph(model):
        nodes, found = [model(example(model)).grad_fn], []
        while nodes:
            node = nodes.pop(0)
            found.append(type(node).__name__)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        return found

    dense, model = build(kind), build(kind)
    optimizer = torch.optim.Adam(model.parameters())
    sc.Pruner(model, 0.9, schedule=sc.cubic(0, 10)).attach(optimizer)
    train(model, optimizer, 3)
    assert operations(model) == operations(dense)
    assert graph(model) == graph(dense)
    for module in model.modules():
        assert not parametrize.is_parametrized(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert type(module).forward is getattr(module.forward, "__func__", None)
        for name, parameter in module._parameters.items():
            assert parameter is None or getattr(module, name) is parameter


def test_a58_weight_decay_groups():
    found = []
    for _, model in through_a_life(Tagger):
        found.append([n for n, _ in model.named_parameters() if n.endswith("weight")])
    assert found[0] == ["embed.weight", "head.weight"]
    assert all(one == found[0] for one in found)
