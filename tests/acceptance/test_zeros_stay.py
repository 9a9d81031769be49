"""Zero stays zero: against every optimizer, old momenta, loaded weights, averages, merges, inf and -0.0."""

import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from models import MODELS, Attention, LanguageModel, Mlp, Net, Tagger, build, copies, k, loss, same, train, zeros

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "lbfgs wolfe": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a19_regrowth_by_the_optimizer(name):
    kind = [Tagger, Net, Mlp][list(OPTIMIZERS).index(name) % 3]
    model = build(kind)
    optimizer = OPTIMIZERS[name](model.parameters())
    scope = sc.weights(model)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    masks, before = pruner.masks, copies(model)
    assert masks.pruned == k(0.9, scope.size)
    for step in range(20):
        train(model, optimizer, 1, first=step)
        assert sc.check(model, masks) == {}
        assert zeros(scope) == masks.pruned
    pruner.finish()
    assert all(bool((w[masks[n]] != before[n][masks[n]]).any()) for n, w in scope.items() if masks[n].any())


def test_a19_sparse_gradients():
    model = nn.Embedding(30, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, scope=sc.weights(model, only=["weight"]))
    pruner.attach(optimizer)
    for step in range(20):
        optimizer.zero_grad()
        model(torch.tensor([step, step + 5])).sum().backward()
        optimizer.step()
        assert int((model.weight == 0).sum()) == 216
    pruner.finish()


@pytest.mark.parametrize("name", ["nesterov", "adam", "amsgrad", "adam fused", "rmsprop", "adagrad", "nadam"])
@pytest.mark.parametrize("way", ["prune", "pruner"])
def test_a20_momentum_made_before_pruning(name, way):
    model = build(Tagger)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 5)
    kept = copies(optimizer_tensors(optimizer, model))
    if way == "prune":
        masks = sc.prune(model, 0.9, optimizer=optimizer)
        pruner = sc.Pruner(model, 0.9)
    else:
        pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    if way == "pruner":
        masks = pruner.masks
    assert pruner.masks == masks
    seen = 0
    for full, remembered in optimizer_tensors(optimizer, model).state_dict().items():
        name = full.split("/")[0]
        if name in masks and remembered.shape == masks.shape(name):
            seen += 1
            assert bool((remembered[~masks[name]] == 0).all()), full
            assert same(remembered[masks[name]], kept[full][masks[name]]), full
        else:
            assert same(remembered, kept[full]), full
    assert seen >= len(masks)
    for step in range(20):
        train(model, optimizer, 1, first=5 + step)
        assert sc.check(model, masks) == {}
    assert zeros(sc.weights(model)) == k(0.9, masks.size)
    pruner.finish()


class optimizer_tensors:
    """What an optimizer remembers, by "parameter/key"."""

    def __init__(self, optimizer, model):
        self._tensors = {
            f"{name}/{key}": value
            for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()
            if isinstance(value, torch.Tensor)
        }

    def state_dict(self):
        return self._tensors


def test_a20_momenta_are_cleared_at_each_change_of_the_masks():
    model = build(Mlp)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(2, 10, every=4))
    pruner.attach(optimizer)
    for step in range(10):
        before = pruner.masks
        train(model, optimizer, 1, first=step)
        if pruner.masks != before:
            for name, weight in sc.weights(model).items():
                assert bool((optimizer.state[weight]["exp_avg"][~pruner.masks[name]] == 0).all())
                assert bool((optimizer.state[weight]["exp_avg_sq"][~pruner.masks[name]] == 0).all())
    pruner.finish()


@pytest.mark.parametrize("made", ["before", "after", "in backward"])
def test_a21_an_optimizer_unknown_to_us_is_followed(made):
    model = build(Tagger)
    if made == "before":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(1, 8))
    pruner.attach()
    try:
        if made == "after":
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if made == "in backward":
            in_backward(model)
            for step in range(10):
                loss(model, step).backward()
                assert sc.check(model, pruner.masks) == {}
        else:
            train(model, optimizer, 10)
        assert pruner.steps == 10
        assert pruner.finish().pruned == k(0.9, sc.weights(model).size) == zeros(sc.weights(model))
    finally:
        pruner.detach()


def in_backward(model):
    optimizers = {p: torch.optim.Adam([p], lr=0.01, foreach=False) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.parametrize("by", ["another optimizer", "hand", "backward hooks"])
def test_a21_or_finish_names_the_layer(by):
    model = build(Tagger)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    train(model, optimizer, 2)
    if by == "another optimizer":
        train(model, torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9), 1)
    elif by == "backward hooks":
        in_backward(model.head)
        loss(model).backward()
    else:
        with torch.no_grad():
            model.head.weight += 0.1
    back = int((~pruner.masks["head.weight"]).sum())
    assert sc.check(model, pruner.masks) == {"head.weight": back}
    with pytest.raises(sc.errors.MaskError, match=rf"(?s)head\.weight \({back}\).*attach.*sc\.remask") as caught:
        pruner.finish()
    assert "lstm" not in str(caught.value)
    sc.remask(model, pruner.masks)
    pruner.finish()


@pytest.mark.parametrize("assign", [False, True])
def test_a22_loaded_weights(assign):
    model = build(Tagger)
    dense = copies(build(Tagger, seed=1))
    optimizer = torch.optim.Adam(model.parameters())
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    train(model, optimizer, 1)
    model.load_state_dict(dense, assign=assign)
    violations = sc.check(model, pruner.masks)
    assert violations == {n: count for n, count in pruner.masks.counts().items() if count}
    assert sum(violations.values()) == k(0.9, pruner.masks.size)
    with pytest.raises(sc.errors.MaskError, match=r"head\.weight"):
        pruner.finish()
    if not assign:
        train(model, optimizer, 1)  # the next step sets them to zero again
    else:
        sc.remask(model, pruner.masks)
    assert sc.check(model, pruner.masks) == {}
    assert zeros(sc.weights(model)) == k(0.9, pruner.masks.size)
    pruner.finish()


def test_a22_a_state_dict_can_be_checked_too():
    model = build(Mlp)
    masks = sc.prune(model, 0.9)
    dense = copies(build(Mlp, seed=1))
    assert sum(sc.check(dense, masks).values()) == 306
    sc.remask(dense, masks)
    assert sc.check(dense, masks) == {}
    model.load_state_dict(dense)
    assert zeros(sc.weights(model)) == 306


@pytest.mark.parametrize("average", ["equal", "ema"])
def test_a23_ema(average):
    model = build(Tagger)
    rule = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if average == "ema" else {}
    ema = AveragedModel(model, **rule)
    keys = list(ema.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(0, 6))
    pruner.attach(optimizer)
    for step in range(8):
        train(model, optimizer, 1, first=step)
        ema.update_parameters(model)
    masks = pruner.finish()
    assert sc.check(ema, masks)  # what was pruned late still weighs in the average
    sc.remask(ema, masks)
    assert sc.check(ema, masks) == {}
    student, averaged = sc.weights(model), sc.weights(ema)
    for name, weight in student.items():
        assert torch.equal(weight == 0, averaged[name] == 0)
    assert list(ema.state_dict()) == keys == ["n_averaged", *(f"module.{n}" for n in model.state_dict())]
    assert all(masks[name].dtype == torch.bool for name in masks)


def test_a24_lora_merge():
    model = build(Mlp)
    masks = sc.prune(model, 0.9)
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 12, generator=generator), torch.randn(20, 2, generator=generator)
    pruned = model.first.weight.detach().clone()
    with torch.no_grad():
        model.first.weight += 0.1 * up @ down
    merged = model.first.weight.detach().clone()
    changes = sc.remask(model, masks)
    assert zeros(sc.weights(model)) == masks.pruned == 306
    assert torch.equal(model.first.weight, torch.where(masks["first.weight"], merged, 0))
    lost = torch.where(masks["first.weight"], 0, merged)
    assert changes["first.weight"] == pytest.approx(float(lost.norm() / merged.norm()), rel=1e-4)
    assert changes["second.weight"] == 0
    assert not torch.equal(model.first.weight, pruned)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a25_nan_and_inf_are_refused(value, score):
    model = build(Tagger)
    with torch.no_grad():
        model.lstm.weight_hh_l1[3, 2] = value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copies(model)
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_l1 holds \d NaN and \d inf.*nan_to_num"):
        sc.prune(model, 0.5, score=score)
    pruner = sc.Pruner(model, 0.5, score=score)
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_l1 "):
        pruner.attach(optimizer)
    assert same(copies(model), before)
    assert pruner.masks.pruned == 0
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a25_inf_under_a_mask_becomes_zero(dtype):
    model = build(Mlp).to(dtype)
    masks = sc.prune(model, 0.9)
    clean = copies(model)
    for value in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            for name, weight in sc.weights(model).items():
                weight.masked_fill_(~masks[name], value)
        assert sum(sc.check(model, masks).values()) == 306
        sc.remask(model, masks)
        assert same(copies(model), clean)


def test_a25_a_blown_up_gradient_under_a_mask():
    model = build(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    pruner = sc.Pruner(model, 0.9)
    pruner.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        with torch.no_grad():
            for name, weight in sc.weights(model).items():
                weight.grad.masked_fill_(~pruner.masks[name], float("inf" if step else "nan"))
        optimizer.step()
        assert all(bool(w.isfinite().all()) for w in model.parameters())
        assert zeros(sc.weights(model)) == 306
    pruner.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a26_no_negative_zero(dtype, layout):
    model = nn.Conv2d(5, 7, 3, bias=False).to(dtype)
    with torch.no_grad():
        values = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        model.weight.copy_(values)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    masks = sc.prune(model, 0.9)
    real = torch.view_as_real(model.weight.detach()) if dtype.is_complex else model.weight.detach()
    pruned = ~masks["weight"]
    assert int(pruned.sum()) == k(0.9, 315)
    assert not bool(real[pruned].signbit().any())
    with torch.no_grad():
        model.weight.masked_fill_(pruned, -0.0)
    sc.remask(model, masks)
    assert not bool(real[pruned].signbit().any())


def test_a26_a_file_is_the_same_as_one_with_positive_zeros():
    """Byte for byte, so that it is as small under any compressor."""
    model = build(Attention)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(0, 4), allocation="uniform")
    pruner.attach(optimizer)
    train(model, optimizer, 6)
    masks = pruner.finish()
    positive = copies(model)
    for name in masks:
        positive[name] = torch.where(masks[name], positive[name], 0.0)

    def written(state):
        file = io.BytesIO()
        torch.save({name: tensor.clone() for name, tensor in state.items()}, file)
        return file.getvalue()

    assert written(model.state_dict()) == written(positive)


@pytest.mark.parametrize("kind", MODELS)
def test_a36_weight_norm_is_refused_with_the_recipe(kind):
    model = build(kind)
    target = model.decoder if kind is LanguageModel else getattr(model, "head", None) or model.first
    name = next(n for n, m in model.named_modules() if m is target)
    if kind is LanguageModel:
        model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())
    nn.utils.parametrizations.weight_norm(target)
    before = copies(model)
    with pytest.raises(
        sc.errors.InputError, match=rf"{name}: weight is computed.*remove_parametrizations\(model\.{name}, 'weight'\)"
    ):
        sc.prune(model, 0.5)
    assert same(copies(model), before)
    nn.utils.parametrize.remove_parametrizations(target, "weight")  # the recipe
    optimizer = torch.optim.Adam(model.parameters())
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    for step in range(5):
        train(model, optimizer, 1, first=step)
        assert zeros(sc.weights(model)) == k(0.5, pruner.masks.size)
    assert f"{name}.weight" in pruner.finish()


def test_a36_weight_norm_of_an_lstm():
    model = build(Tagger)
    nn.utils.parametrizations.weight_norm(model.lstm, "weight_hh_l0")
    for choice in ({}, {"only": ["lstm"]}, {"only": ["*"]}, {"only": [nn.LSTM]}):
        with pytest.raises(sc.errors.InputError, match=r"lstm: weight_hh_l0 is computed"):
            sc.prune(model, 0.5, scope=sc.weights(model, **choice) if choice else None)
    assert sc.prune(model, 0.5, scope=sc.weights(model, skip=["lstm"])).pruned == 40


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a36_norms_of_the_old_kind(norm):
    model = build(Mlp)
    getattr(nn.utils, norm)(model.first)
    before = copies(model)
    with pytest.raises(sc.errors.InputError, match=rf"first.*remove_{norm}") as caught:
        sc.prune(model, 0.5)
    assert "from_torch_prune" not in str(caught.value)
    assert same(copies(model), before)


def test_a36_a_parametrized_module_of_the_users_own():
    """Chosen by name, its `original` must not be pruned in silence: zeros in it would not be zeros of the weight."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

    class Shift(nn.Module):
        def forward(self, x):
            return x + 1

    model = nn.Sequential(Own(), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "matrix", Shift())
    with pytest.raises(sc.errors.SecateurError, match="remove_parametrizations"):
        sc.prune(model, 0.5, scope=sc.weights(model, only=["0"]))
