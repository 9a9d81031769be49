"""secateur.pruner: the model that is there, and what became of it; other pruners; given masks."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur.errors import InputError, MaskError, SecateurWarning, StateError, UnknownNameError
from tiny import net, train


def test_weights_assigned_in_between():
    model = net()
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 4))
    for _ in range(2):
        pruner.step()
    masks = pruner.masks
    model.load_state_dict({n: v.clone() for n, v in net(5).state_dict().items()}, assign=True)
    assert sc.check(model, masks)
    for _ in range(2):
        pruner.step()
    assert pruner.masks & masks == pruner.masks
    assert pruner.finish().pruned == 72
    assert sc.check(model, pruner.masks) == {}


def test_weights_assigned_while_attached_are_not_lost_in_silence():
    """The optimizer now moves parameters that the model no longer has: a warning, an error, or still zeros."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.5)
    pruner.attach(optimizer)
    model.load_state_dict({n: v.clone() for n, v in net(5).state_dict().items()}, assign=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, range(1))
            pruner.finish()
    except (StateError, MaskError, InputError):
        return
    assert caught or sc.check(model, pruner.masks) == {}


def linear(stop=4):
    return sc.linear(0, stop)


def attached(model, schedule=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.8, schedule=schedule or linear())
    pruner.attach(optimizer)
    return pruner, optimizer


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_layer_is_told_at_the_step_and_refused_at_the_end(when):
    model = net()
    pruner, optimizer = attached(model)
    if when == "after":
        train(model, optimizer, range(4))
    model[2] = nn.Linear(10, 3)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    told = r"2\.weight is no longer the model's: its Linear was replaced.*make a new Pruner"
    with pytest.warns(SecateurWarning, match=told) as caught:
        train(model, optimizer, range(6))
    assert len(caught) == 1  # once
    with pytest.raises(StateError, match=told):
        pruner.finish()
    with pytest.raises(StateError, match=told):
        pruner.mask_gradients()


COMPUTED = {
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m), "parametrize.remove_parametrizations"),
    "spectral norm": (lambda m: nn.utils.parametrizations.spectral_norm(m), "parametrize.remove_parametrizations"),
    "old spectral norm": (lambda m: nn.utils.spectral_norm(m), "remove_spectral_norm"),
    "a parametrization": (
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Identity()),
        "parametrize.remove_parametrizations",
    ),
    "torch prune": (lambda m: torch_prune.identity(m, "weight"), r"torch\.nn\.utils\.prune\.remove\(model\[0\]"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_later(kind):
    put_on, remedy = COMPUTED[kind]
    model = net()
    pruner, optimizer = attached(model)
    train(model, optimizer, range(4))
    put_on(model[0])
    told = rf"0\.weight is computed by .*{remedy}.*make a new Pruner"
    with pytest.raises(StateError, match=told):
        pruner.finish()
    with pytest.raises(StateError, match=told):
        train(model, optimizer, range(1))
    by_hand = sc.Pruner(other := net(), 0.8)
    put_on(other[0])
    with pytest.raises(StateError, match=told):
        by_hand.step()


def test_a_renewed_parameter_that_no_optimizer_steps():
    model = net()
    pruner, optimizer = attached(model)
    train(model, optimizer, range(2))
    model[0].weight = nn.Parameter(torch.randn(10, 6))
    with pytest.warns(SecateurWarning, match=r"0\.weight is in scope and trainable, but in none of these optimizers"):
        train(model, optimizer, range(6))
    with pytest.raises(StateError, match=r"after 2 steps.*0\.weight was not stepped since"):
        pruner.finish()


def test_a_renewed_parameter_after_the_last_step():
    model = net()
    pruner, optimizer = attached(model)
    train(model, optimizer, range(4))
    model[0].weight = nn.Parameter(torch.randn(10, 6))
    with pytest.raises(MaskError, match=r"0\.weight \(\d+\).*sc\.remask\(model, pruner\.masks\)"):
        pruner.finish()


def test_a_renewed_parameter_that_the_optimizer_steps_is_pruned():
    model = net()
    pruner, optimizer = attached(model)
    train(model, optimizer, range(2))
    model[0].weight = nn.Parameter(torch.randn(10, 6))
    optimizer.add_param_group({"params": [model[0].weight]})
    train(model, optimizer, range(2))
    assert pruner.finish().pruned == 72
    assert sc.check(model, pruner.masks) == {}


def test_a_weight_of_another_shape():
    model = net()
    pruner, _ = attached(model)
    model[0].weight = nn.Parameter(torch.randn(12, 6))
    with pytest.raises(
        StateError, match=r"0\.weight has shape \(12, 6\) now, and its mask \(10, 6\): make a new Pruner"
    ):
        pruner.finish()


def test_a_layer_that_came_later_is_told_at_the_end():
    model = net()
    skipping = sc.Pruner(model, 0.5, scope=sc.weights(model, only="0"))
    skipping.step()
    skipping.finish()  # what was left out is no newcomer
    pruner = sc.Pruner(model, 0.8)
    pruner.step()
    model[0] = nn.Sequential(model[0], nn.ReLU())  # wrapped: the same Parameter
    pruner.finish()
    model.append(nn.Linear(3, 3))
    with pytest.warns(SecateurWarning, match=r"3\.weight came into .* 9 weights .*when the model is whole"):
        assert pruner.finish().pruned == 72


def test_a_tie_that_was_cut():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    pruner = sc.Pruner(model, 0.5)
    pruner.step()
    model.load_state_dict(model.state_dict(), assign=True)
    pruner.finish()
    model["b"].weight = nn.Parameter(model["b"].weight.detach().clone())
    with pytest.raises(StateError, match=r"b\.weight was one Parameter with a\.weight .*tie them again"):
        pruner.finish()


def test_a_layer_that_is_wrapped_or_moved_is_still_the_models():
    model = net()
    pruner, optimizer = attached(model)
    model[0] = nn.Sequential(model[0])
    model[2] = nn.Sequential(nn.Identity(), model[2])
    train(model, optimizer, range(4))
    assert pruner.finish().pruned == 72
    assert model[0][0].weight.count_nonzero() + model[2][1].weight.count_nonzero() == 18


def test_a_loop_that_steps_another_optimizer():
    model = net()
    pruner, _ = attached(model)
    train(model, torch.optim.Adam(model.parameters()), range(4))
    with pytest.raises(StateError, match=r"never stepped; the loop may step another object.*attach\(\) without arg"):
        pruner.finish()
    with pytest.raises(StateError, match=r"after 0 steps.*attach\(optimizer\) before the loop"):
        sc.Pruner(net(), 0.5).finish()


def test_averages_swapped_in_are_found_by_finish():
    model = net()
    pruner, optimizer = attached(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    with pytest.raises(MaskError, match=r"an average of the weights swapped in.*sc\.remask"):
        pruner.finish()
    sc.remask(model, pruner.masks)
    assert pruner.finish().pruned == 72


# a second pruner, and zeros that nothing holds


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_second_pruner_on_the_same_weights(first, second):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one, two = sc.Pruner(model, 0.8, schedule=linear()), sc.Pruner(model, 0.5)
    one.attach(*[optimizer] * first)
    remedy = r"another pruner, Pruner\(sparsity=0\.8.*still holds 0\.weight, 2\.weight: .*detach\(\) first"
    try:
        if first and not second:
            two.attach()  # which optimizers there are is not known yet
            with pytest.raises(StateError, match=remedy):
                train(model, optimizer, range(1))
            two.detach()
        else:
            with pytest.raises(StateError, match=remedy):
                two.attach(*[optimizer] * second)
        one.detach()
        two.attach(optimizer)
    finally:
        one.detach()
        two.detach()


def test_two_pruners_of_different_weights():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruners = [sc.Pruner(model, 0.5, scope=sc.weights(model, only=name)) for name in ("0", "2")]
    for pruner in pruners:
        pruner.attach(optimizer)
    train(model, optimizer, range(2))
    assert [pruner.finish().pruned for pruner in pruners] == [30, 15]


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_new_pruner_on_a_pruned_checkpoint(by_hand):
    model = net()
    sc.prune(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.9, schedule=sc.cubic(1, 4))
    told = r"81 of 90 weights in scope are zero.*pruner\.load_state_dict.*Masks\.from_zeros"
    if by_hand:
        with pytest.warns(SecateurWarning, match=told):
            pruner.step()
        return
    pruner.attach(optimizer)
    with pytest.warns(SecateurWarning, match=told) as caught:
        train(model, optimizer, range(4))
    assert len(caught) == 1
    assert pruner.finish().pruned == 81


def test_more_zeros_than_asked_for():
    model = net()
    sc.prune(model, 0.9)
    pruner = sc.Pruner(model, 0.5)
    with pytest.warns(SecateurWarning, match="36 of 90 weights in scope are zero"):
        pruner.step()
    with pytest.warns(SecateurWarning, match=r"36 weights outside the masks are zero too.*0\.9 and not 0\.5"):
        pruner.finish()


def test_layers_begun_at_zero_and_padding_are_no_checkpoint():
    model = nn.Sequential(nn.Embedding(4, 8, padding_idx=0), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    pruner = sc.Pruner(model, 0.1, schedule=linear(), scope=sc.weights(model, only=[nn.Embedding, nn.Linear]))
    pruner.step()


# given masks


@pytest.mark.parametrize("kind", ["Adam", "SGD", "RMSprop", "by hand"])
@pytest.mark.parametrize("plain", [True, False])
def test_given_masks_are_held(kind, plain):
    model = net()
    masks = sc.prune(model, 0.7, score="random")
    pruner = sc.Pruner(model, dict(masks) if plain else masks)
    optimizer = getattr(torch.optim, kind.replace("by hand", "SGD"))(model.parameters(), lr=0.05)
    if kind != "by hand":
        pruner.attach(optimizer)
    train(model, optimizer, range(4), lambda step: pruner.step() if kind == "by hand" else None)
    assert pruner.finish() == masks
    assert pruner.steps == 4
    assert sum(int((w == 0).sum()) for w in sc.weights(model).values()) == 63


def test_given_masks_of_some_tensors_and_a_bias():
    model = net()
    masks = sc.Masks({"2.weight": torch.rand(3, 10) < 0.5, "0.bias": torch.rand(10) < 0.5})
    pruner, optimizer = sc.Pruner(model, masks), torch.optim.Adam(model.parameters())
    pruner.attach(optimizer)
    train(model, optimizer, range(3))
    assert pruner.finish() == masks
    assert model[0].weight.all()


def test_given_masks_go_on_from_a_saved_state():
    model = net()
    masks = sc.prune(model, 0.7)
    pruner = sc.Pruner(model, masks)
    pruner.step()
    again = sc.Pruner(model, masks)
    again.load_state_dict(pruner.state_dict())
    assert (again.steps, again.masks) == (1, masks)
    other = sc.prune(net(1), 0.7, score="random")
    with pytest.raises(InputError, match=r"other settings: masks .*build this one with the same"):
        sc.Pruner(model, other).load_state_dict(pruner.state_dict())


def test_given_masks_that_do_not_fit():
    masks = sc.prune(net(), 0.5)
    with pytest.raises(UnknownNameError, match=r"it has no 0\.weight; the nearest names"):
        sc.Pruner(nn.ModuleDict({"a": nn.Linear(6, 10)}), masks)
    with pytest.raises(MaskError, match=r"0\.weight has shape \(5, 5\), its mask \(10, 6\)"):
        sc.Pruner(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(10, 3)), masks)
    for options in ({"score": "random"}, {"allocation": "erk"}, {"schedule": linear()}, {"pattern": "rows"}):
        with pytest.raises(InputError, match=r"given masks .*: leave "):
            sc.Pruner(net(), masks, **options)


def test_a_pruner_prints_in_one_line():
    pruner = sc.Pruner(net(), 0.9, schedule=sc.cubic(0, 40, 5))
    pruner.step()
    assert repr(pruner) == "Pruner(sparsity=0.9, schedule=cubic(start=0, stop=40, every=5), steps=1, now=0)"
