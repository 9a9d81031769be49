"""What a Pruner tells the loop around it, and what the loop tells a Pruner."""

import copy
import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError
from tiny import net, same, train


def made(schedule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    return sc.Pruner(model, 0.8, schedule=schedule), model


def test_each_change_of_the_masks_is_told():
    pruner, model = made(sc.linear(0, 8, every=2))
    told = []
    pruner.on_update(told.append)
    pruner.on_update(lambda metrics: told.append(metrics["pruning/step"]))
    for _ in range(12):
        pruner.step()
    assert [entry["pruning/sparsity"] for entry in told[::2]] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert told[1::2] == [2, 4, 6, 8]
    assert told[-2] == pruner.metrics() | {"pruning/step": 8}
    assert list(told[0]) == [
        "pruning/step",
        "pruning/sparsity",
        "pruning/sparsity/0.weight",
        "pruning/sparsity/2.weight",
    ]
    shares = [told[-2][f"pruning/sparsity/{name}"] * w.numel() for name, w in sc.weights(model).items()]
    assert sum(shares) == pytest.approx(0.8 * 250)
    assert all(type(value) in (int, float) for value in told[0].values())


def test_when_it_is_done():
    pruner, model = made(sc.linear(0, 4))
    assert pruner.model is model
    done = []
    for _ in range(5):
        pruner.step()
        done.append(pruner.done)
    assert done == [False, False, False, True, True]


def test_a_schedule_in_fractions_is_told_the_length():
    pruner, model = made(sc.linear(0.25, 0.75, every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"length is not known: give schedule\.over\(total_steps\)"):
        pruner.attach(optimizer)
    with pytest.raises(InputError, match=r"length is not known"):
        pruner.step()
    pruner.over(16)
    pruner.over(99)  # it is in steps by now
    assert repr(pruner) == "Pruner(sparsity=0.8, schedule=linear(start=4, stop=12, every=2), steps=0, now=0)"
    for _ in range(16):
        pruner.step()
    assert pruner.finish().sparsity == 0.8


def test_a_snapshot_from_before_the_length_was_known():
    pruner, model = made(sc.linear(0.0, 0.5))
    before = model[0].weight.detach().clone()
    pruner.snapshot()
    pruner.over(8)
    for _ in range(4):
        pruner.step()
    assert not torch.equal(model[0].weight, before)
    pruner.undo()
    assert torch.equal(model[0].weight, before)
    assert (pruner.steps, pruner.masks.pruned) == (0, 0)


@pytest.mark.parametrize("schedule", ["one_shot", sc.linear(0, 4), lambda step: 0.8])
def test_a_schedule_in_steps_stays(schedule):
    pruner, _ = made(schedule)
    before = repr(pruner)
    pruner.over(1000)
    assert repr(pruner) == before


def test_what_cannot_be_called():
    pruner, _ = made("one_shot")
    with pytest.raises(InputTypeError, match="call is 3: give a function of a dict"):
        pruner.on_update(3)


# NaN at a change of the masks of an attached Pruner


def spoiled(score="magnitude", **options):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 8, every=4), score=score, **options)
    pruner.attach(optimizer)
    train(model, optimizer, range(7))
    masks = pruner.masks
    with torch.no_grad():
        model[0].weight[tuple(masks["0.weight"].nonzero()[0])] = math.nan
    with pytest.warns(
        SecateurWarning, match=r"were to change at step 8, and stay as they are: 0\.weight holds"
    ) as told:
        train(model, optimizer, range(3))
    assert len(told) == 1  # not at each step
    assert pruner.masks == masks
    assert pruner.steps == 10
    return model, optimizer, pruner


@pytest.mark.parametrize("score", ["magnitude", "taylor", "movement", "random"])
def test_nan_in_a_run_holds_the_masks_until_the_numbers_are_finite(score):
    model, optimizer, pruner = spoiled(score)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
    train(model, optimizer, range(1))
    assert pruner.finish().pruned == 72


def test_nan_to_the_end_is_told_by_finish():
    _, _, pruner = spoiled()
    with pytest.raises(StateError, match=r"after 10 steps 36 weights are pruned, of the 72 asked for.*go on training"):
        pruner.finish()


def test_nan_when_attaching_is_an_error():
    model = net()
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"0\.weight holds 1 NaN.*sound checkpoint"):
        sc.Pruner(model, 0.8).attach(torch.optim.SGD(model.parameters(), lr=0.1))


# masks that are lifted


@pytest.mark.parametrize("options", [{"allocation": "erk"}, {"pattern": "rows"}, {"score": "taylor"}], ids=repr)
def test_ac_dc_lifts_the_masks_and_chooses_them_anew(options):
    def run(steps, model, optimizer, pruner, told):
        def each(step):
            told.append(pruner.masks.pruned)
            assert sc.check(model, pruner.masks) == {}

        train(model, optimizer, steps, each)

    def made():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, sc.Pruner(model, 0.8, schedule=sc.schedules.ac_dc(2, 18, every=4), **options)

    model, optimizer, pruner = made()
    pruner.attach(optimizer)
    told = []
    run(range(17), model, optimizer, pruner, told)
    full = told[1]
    assert full == pytest.approx(72, abs=6)
    assert told == [0] + [full] * 4 + [0] * 4 + [full] * 4 + [0] * 4
    with pytest.raises(StateError, match=r"after 17 steps 0 weights are pruned.*go on training"):
        pruner.finish()
    again, its, other = made()
    for thing, state in ((again, model), (its, optimizer), (other, pruner)):
        thing.load_state_dict(copy.deepcopy(state.state_dict()))
    other.attach(its)
    run(range(17, 25), model, optimizer, pruner, told)
    run(range(17, 25), again, its, other, [])
    assert pruner.finish() == other.finish()
    assert same(model, again)
    assert told[-8:] == [full] * 8


def test_what_is_lifted_begins_at_zero():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, 0.8, schedule=sc.schedules.ac_dc(0, 12, every=4))
    pruner.attach(optimizer)
    masks = pruner.masks
    train(model, optimizer, range(4))
    assert pruner.masks.pruned == 0
    for name, weight in sc.weights(model).items():
        for tensor in (weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
            assert not tensor[~masks[name]].any()
            assert tensor[masks[name]].any()
    train(model, optimizer, range(4, 12))
    assert pruner.finish() != masks


def test_another_schedule_may_not_fall():
    model = net()
    pruner = sc.Pruner(model, 0.8, schedule=lambda step: 0.8 if step < 2 else 0.0)
    pruner.step()
    with pytest.raises(InputError, match=r"falls at step 2.*must never fall"):
        pruner.step()


def test_ac_dc_has_not_come_to_its_end_in_its_first_sparse_phase():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = sc.Pruner(model, 0.8, schedule=sc.schedules.ac_dc(0, 12, every=4))
    pruner.attach(optimizer)
    train(model, optimizer, range(3))
    assert pruner.sparsity == 0.8
    assert not pruner.done
    with pytest.raises(StateError, match=r"ac_dc\(start=0, stop=12, every=4\) has not come to its end"):
        pruner.finish()
    train(model, optimizer, range(3, 12))
    assert pruner.done
    assert pruner.finish().pruned == 72


@pytest.mark.parametrize("regrow", [None, sc.feedback.dpf(every=2)])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt("mine")])
def test_an_error_at_a_change_of_the_masks_leaves_the_zeros(regrow, error):
    calls = []

    def score(name, weight):
        calls.append(name)
        if len(calls) == 3:
            raise error
        return weight.abs()

    torch.manual_seed(0)
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = sc.Pruner(model, 0.8, schedule=sc.linear(0, 8, every=2), score=score, regrow=regrow)
    pruner.attach(optimizer)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(1, 20)).square().sum().backward()
            optimizer.step()

    with pytest.raises(type(error), match="mine"):
        steps(8)
    assert pruner.masks.pruned > 0
    assert sc.check(model, pruner.masks) == {}
    steps(8)
    assert pruner.finish().pruned == 160
