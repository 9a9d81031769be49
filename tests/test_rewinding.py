"""secateur.rewinding: weights, buffers and optimizer of an early step, zeros of now; all or nothing."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, MaskError, StateError, UnknownNameError
from tiny import batch


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3))


def train(model, optimizer, steps):
    model.train()
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    early = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(3, 10))
    return model, optimizer, early


def everything(*things):
    """Each tensor and number, to compare; a copy."""
    return [repr(copy.deepcopy(thing.state_dict())) for thing in things]


def test_weights_buffers_and_optimizer_go_back():
    model, optimizer, (state, optimizer_state) = trained()
    ids = [id(p) for p in model.parameters()]
    kept = copy.deepcopy((state, optimizer_state))
    masks = sc.prune(model, 0.7, optimizer=optimizer)
    for _ in range(2):
        sc.rewind(model, state, masks, optimizer=optimizer, optimizer_state=optimizer_state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name] if name not in masks else state[name] * masks[name]), name
        assert ids == [id(p) for p in model.parameters()]
        for at, (name, p) in enumerate(model.named_parameters()):
            for key in ("exp_avg", "exp_avg_sq"):
                then = optimizer_state["state"][at][key]
                assert torch.equal(optimizer.state[p][key], then * masks[name] if name in masks else then)
            assert float(optimizer.state[p]["step"]) == 3
        train(model, optimizer, range(3, 6))  # and the states are kept for the next round
        assert repr((state, optimizer_state)) == repr(kept)
    pruner = sc.Pruner(model, masks)
    pruner.attach(optimizer)
    train(model, optimizer, range(3))
    assert pruner.finish() == masks


def test_to_the_beginning_without_an_optimizer():
    model = net()
    state = copy.deepcopy(model.state_dict())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(5))
    masks = sc.prune(model, 0.5)
    sc.rewind(nn.parallel.DataParallel(model), state, dict(masks))
    assert sc.check(model, masks) == {}
    assert all(torch.equal(model.state_dict()[name][mask], state[name][mask]) for name, mask in masks.items())


def test_three_rounds_while_a_pruner_is_attached():
    model, optimizer, (state, optimizer_state) = trained()
    pruner = sc.Pruner(model, 0.8, schedule=sc.geometric(0, 15, every=5))
    pruner.attach(optimizer)
    counts = []
    for _ in range(3):
        train(model, optimizer, range(3, 8))
        sc.rewind(model, state, pruner.masks, optimizer=optimizer, optimizer_state=optimizer_state)
        counts.append(pruner.masks.pruned)
    train(model, optimizer, range(3, 8))
    masks = pruner.finish()
    assert counts[-1] == masks.pruned == 72
    assert counts[0] == round(90 * sc.geometric(0, 3).sparsity(1, Fraction(4, 5)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": None}, InputTypeError, r"state is None: give what model\.state_dict\(\) gave"),
        ({"state": {}}, UnknownNameError, r"0\.bias, 0\.weight, 1\.bias, \.\.\. is in one of them only; give what"),
        (
            {"state": {**net().state_dict(), "x": torch.ones(1)}},
            UnknownNameError,
            "x is in one of them only; give what",
        ),
        ({"state": {**net().state_dict(), "3.weight": torch.ones(3)}}, MaskError, r"3\.weight is not of .*give what"),
        ({"masks": {"9.weight": torch.ones(3, 10, dtype=torch.bool)}}, UnknownNameError, "another model"),
        ({"masks": {"3.weight": torch.ones(3, dtype=torch.bool)}}, MaskError, "another model"),
        ({"masks": {"3.weight": torch.ones(3, 10)}}, InputTypeError, "give a bool tensor"),
        ({"optimizer": None}, InputError, "give both optimizer and optimizer_state, or leave both out"),
        ({"optimizer_state": None}, InputError, "give both optimizer and optimizer_state, or leave both out"),
        ({"optimizer": 3}, InputTypeError, "give the optimizer"),
        ({"optimizer_state": {"state": {}, "param_groups": []}}, InputError, r"not of this Adam .*give what"),
        ({"optimizer_state": 5}, InputError, r"not of this Adam .*give what"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, error, message):
    model, optimizer, (state, optimizer_state) = trained()
    masks = sc.Masks({"3.weight": torch.rand(3, 10) > 0.5})
    before = everything(model, optimizer)
    options = {"masks": masks, "state": state, "optimizer": optimizer, "optimizer_state": optimizer_state, **change}
    with pytest.raises(error, match=message):
        sc.rewind(model, **options)
    assert everything(model, optimizer) == before


def test_a_memory_whose_zero_is_not_known_changes_nothing():
    model, optimizer, (state, _) = trained()
    masks = sc.Masks({"3.weight": torch.rand(3, 10) > 0.5})
    odd = copy.deepcopy(optimizer.state_dict())
    odd["state"][4]["codes"] = torch.ones(3, 10, dtype=torch.uint8)
    odd["state"][4]["zero_point"] = torch.ones(1)
    optimizer.register_load_state_dict_post_hook(
        lambda one: [
            one.state[p].update(codes=one.state[p]["codes"].byte()) for p in one.state if "codes" in one.state[p]
        ]
    )
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=r"whose zero is not known: prune with an optimizer that keeps its state in"):
        sc.rewind(model, state, masks, optimizer=optimizer, optimizer_state=odd)
    assert everything(model, optimizer) == before


def test_a_state_that_is_no_copy_is_no_early_one():
    model, optimizer, (state, _) = trained()
    masks = sc.prune(model, 0.5)
    for wrong in ({"state": model.state_dict()}, {"optimizer_state": optimizer.state_dict()}):
        options = {"state": state, "optimizer": optimizer, "optimizer_state": {}, **wrong}
        if "state" in wrong:
            options |= {"optimizer": None, "optimizer_state": None}
        with pytest.raises(InputError, match=r"is the state of now.*keep copy\.deepcopy\(model\.state_dict\(\)\)"):
            sc.rewind(model, masks=masks, **options)


@pytest.mark.parametrize("everywhere", [False, True])
def test_dense_weights_of_now_are_refused(everywhere):
    """A feedback would bring them back among the early ones, at once or when it is attached again."""
    model, optimizer, (state, optimizer_state) = trained()
    pruner = sc.Pruner(model, 0.8, regrow="dpf")
    pruner.attach(*[optimizer] * (not everywhere))
    train(model, optimizer, range(3))
    before, masks = everything(model, optimizer), pruner.masks
    given = {} if everywhere else {"optimizer": optimizer, "optimizer_state": optimizer_state}
    with pytest.raises(StateError, match=r"keeps the dense weights of now.*detach\(\) it.*sc\.Pruner\(model, masks\)"):
        sc.rewind(model, state, masks, **given)
    assert everything(model, optimizer) == before
    pruner.detach()
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict()))
    sc.rewind(model, state, masks, **given)
    for _ in range(2):
        with pytest.raises(StateError, match=r"0\.weight.* changed while .* detached.*or make a new Pruner"):
            pruner.attach(optimizer)
    pruner.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    pruner.attach(optimizer)  # both of one moment
    pruner.detach()
    sc.rewind(model, state, masks, **given)
    held = sc.Pruner(model, masks)
    held.attach(optimizer)
    train(model, optimizer, range(3))
    assert held.finish() == masks


def test_dense_weights_of_another_model_are_no_matter():
    other = net()
    pruner = sc.Pruner(other, 0.8, regrow="dpf")
    pruner.attach()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(3))
    model, _, (state, _) = trained()
    sc.rewind(model, state, sc.prune(model, 0.5))
    pruner.detach()
