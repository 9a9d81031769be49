"""The Pruner counts steps and zeros of the model that is there: wrappers, replaced layers, averages, other pruners."""

import pytest
import torch
from torch import nn

import secateur as sc
from models import Mlp, build, k, loss, train, zeros
from secateur.errors import MaskError, SecateurWarning, StateError


class Wrapped(torch.optim.Optimizer):
    """Steps another optimizer inside its own step."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)

    def step(self, closure=None):
        return self.base.step(closure)


def adam(model, kind=torch.optim.Adam):
    return kind(model.parameters(), lr=0.01)


def attached(model, optimizer, sparsity=0.9, stop=6):
    pruner = sc.Pruner(model, sparsity, schedule=sc.cubic(0, stop))
    pruner.attach(optimizer)
    return pruner


@pytest.mark.parametrize("given", [True, False])
def test_a72_a_step_inside_a_step_counts_once(given):
    model = build(Mlp)
    optimizer = Wrapped(model.parameters(), torch.optim.Adam, lr=0.01)
    pruner = sc.Pruner(model, 0.9, schedule=sc.linear(0, 10))
    pruner.attach(*[optimizer] * given)
    try:
        train(model, optimizer, 10)
        assert pruner.steps == 10
        masks = pruner.finish()
    finally:
        pruner.detach()
    assert masks.pruned == zeros(sc.weights(model)) == k(0.9, masks.size)
    for name, weight in sc.weights(model).items():
        assert not optimizer.base.state[weight]["exp_avg"][~masks[name]].any()


@pytest.mark.parametrize("late", [True, False])
def test_a73_a_replaced_layer(late):
    model = build(Mlp)
    optimizer = adam(model)
    pruner = attached(model, optimizer)
    train(model, optimizer, 7 if late else 2)
    model.second = nn.Linear(model.second.in_features, model.second.out_features)
    optimizer.add_param_group({"params": list(model.second.parameters())})
    with pytest.warns(SecateurWarning, match=r"second\.weight is no longer the model's"):
        train(model, optimizer, 5, first=7)
    with pytest.raises(StateError, match=r"second\.weight is no longer the model's.*make a new Pruner"):
        pruner.finish()


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a73_a_norm_put_on_later(norm):
    model = build(Mlp)
    optimizer = adam(model)
    pruner = attached(model, optimizer)
    train(model, optimizer, 7)
    norm(model.first)
    with pytest.raises(StateError, match=r"first\.weight is computed by .*remove_parametrizations\(model\.first"):
        pruner.finish()


def test_a73_a_renewed_parameter():
    model = build(Mlp)
    optimizer = adam(model)
    pruner = attached(model, optimizer)
    train(model, optimizer, 7)
    model.first.weight = nn.Parameter(torch.randn_like(model.first.weight))
    with pytest.raises(MaskError, match=r"first\.weight \(\d+\).*sc\.remask"):
        pruner.finish()


def test_a74_an_average_swapped_in():
    model = build(Mlp)
    optimizer = adam(model)
    pruner = attached(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(8):
        train(model, optimizer, 1, first=step)
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    with pytest.raises(MaskError, match=r"an average of the weights swapped in.*sc\.remask\(model, pruner\.masks\)"):
        pruner.finish()


def test_a74_schedule_free():
    schedulefree = pytest.importorskip("schedulefree")
    model = build(Mlp)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    pruner = attached(model, optimizer)
    optimizer.train()
    train(model, optimizer, 8)
    masks = pruner.finish()
    optimizer.eval()
    assert zeros(sc.weights(model)) == masks.pruned == k(0.9, masks.size)


def test_a75_a_cell_run_twice():
    model = build(Mlp)
    optimizer = adam(model)
    first = attached(model, optimizer)
    train(model, optimizer, 8)
    with pytest.raises(StateError, match=r"another pruner, Pruner\(sparsity=0\.9.*finish\(\) or detach\(\) first"):
        attached(model, optimizer, 0.5)
    assert first.finish().pruned == zeros(sc.weights(model))


def test_a75_a_new_pruner_on_a_pruned_checkpoint():
    model = build(Mlp)
    sc.prune(model, 0.9)
    optimizer = adam(model)
    attached(model, optimizer, stop=20)
    before = zeros(sc.weights(model))
    loss(model, 0).backward()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(zeros(sc.weights(model))))  # after the pruner's
    with pytest.warns(SecateurWarning, match=r"grow back.*pruner\.load_state_dict.*from_zeros"):
        optimizer.step()
    assert seen == [before]


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("follow", [True, False])
def test_a75_a_new_pruner_each_round_takes_the_zeros_of_the_last(score, follow):
    model = build(Mlp)
    optimizer = adam(model)
    sc.prune(model, 0.1, score=score)
    for sparsity in (0.1, 0.2, 0.5, 0.9):
        pruner = sc.Pruner(model, sparsity, score=score)
        if follow:
            pruner.attach(optimizer)
        for step in range(3):
            train(model, optimizer, 1, first=step)
            if not follow:
                pruner.step()
        assert pruner.finish().pruned == zeros(sc.weights(model)) == k(sparsity, pruner.masks.size)


def test_a75_a_schedule_that_begins_where_the_checkpoint_ends():
    model = build(Mlp)
    sc.prune(model, 0.5)
    optimizer = adam(model)
    pruner = sc.Pruner(model, 0.9, schedule=lambda step: min(0.5 + 0.1 * step, 0.9))
    pruner.attach(optimizer)
    train(model, optimizer, 4)
    assert pruner.finish().pruned == zeros(sc.weights(model)) == k(0.9, pruner.masks.size)


def test_a75_zeros_of_frozen_tensors_do_not_grow():
    model = build(Mlp)
    sc.prune(model, 0.9, scope=sc.weights(model, only=["first.weight"]))
    model.first.weight.requires_grad_(False)
    optimizer = adam(model)
    pruner = attached(model, optimizer, 0.95)
    train(model, optimizer, 7)
    assert pruner.finish().pruned == zeros(sc.weights(model)) == k(0.95, pruner.masks.size)


class EightBit(torch.optim.Optimizer):
    """Momentum in int8 with a scale."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            value = p.grad + (0.9 * state["codes"] * state["scale"] if state else 0)
            state["scale"] = value.abs().max() / 127 + 1e-12
            state["codes"] = (value / state["scale"]).round().to(self.kind)
            p.sub_(value, alpha=0.1)

    kind = torch.int8


class Unsigned(EightBit):
    kind = torch.uint8


def test_a76_low_bit_states_are_zeroed_by_value():
    model = build(Mlp)
    optimizer = EightBit(model.parameters())
    train(model, optimizer, 3)
    masks = sc.prune(model, 0.9, optimizer=optimizer)
    for name, weight in sc.weights(model).items():
        assert not optimizer.state[weight]["codes"][~masks[name]].any()
        assert optimizer.state[weight]["codes"].any()


def test_a76_or_refused_before_anything_is_written():
    model = build(Mlp)
    optimizer = Unsigned(model.parameters())
    train(model, optimizer, 3)
    with pytest.raises(sc.errors.InputError, match=r"codes of first\.weight .*torch\.uint8.*make a new optimizer"):
        sc.prune(model, 0.9, optimizer=optimizer)
    assert zeros(sc.weights(model)) == 0
