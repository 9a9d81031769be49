"""secateur.movers: masks move until `stop`; from there on a pruner is one whose masks stay."""

import pytest
import torch

import secateur as sc
from secateur.errors import InputError, InputTypeError
from tiny import interrupted, net, same, train

METHODS = {
    "dpf": lambda stop: sc.feedback.dpf(every=2, stop=stop),
    "sr_ste": lambda stop: sc.feedback.sr_ste(stop=stop),
    "soft_movement": lambda stop: sc.feedback.soft_movement(stop=stop),
    "str": lambda stop: sc.feedback.str_(every=2, stop=stop),
    "rigl": lambda stop: sc.regrow.rigl(every=2, stop=stop),
}


def built(kind, stop=15):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, optimizer, sc.Pruner(model, 0.7, schedule=sc.cubic(0, 12, every=2), regrow=METHODS[kind](stop))


def test_every_feedback_is_tried_here():
    assert set(sc.feedback.FEEDBACKS) < set(METHODS)


@pytest.mark.parametrize("kind", METHODS)
def test_masks_stay_from_there_on_and_nothing_is_withheld(kind):
    model, optimizer, pruner = built(kind)
    pruner.attach(optimizer)
    train(model, optimizer, range(15))
    masks, grown = pruner.masks, pruner.metrics()["pruning/grown"]
    train(model, optimizer, range(15, 30), lambda step: sc.check(model, masks) and pytest.fail(f"at step {step}"))
    assert pruner.finish() == masks
    assert pruner.metrics()["pruning/grown"] == grown
    kept = pruner.state_dict().get("withheld", {"seen": []})
    assert kept["seen"] == []


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("at", [14, 15, 16])
def test_a_resume_around_it_is_bit_exact(kind, at):
    (model, _, pruner), (again, _, more) = interrupted(lambda: built(kind), at, 25)
    assert same(model, again)
    assert pruner.masks == more.masks


@pytest.mark.parametrize("kind", METHODS)
def test_undo_after_it_begins_anew(kind):
    model, optimizer, pruner = built(kind)
    pruner.snapshot()
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    first = pruner.finish()
    pruner.undo()
    model.load_state_dict(net().state_dict())  # the biases
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner.attach(optimizer)
    train(model, optimizer, range(20))
    assert pruner.finish() == first


def test_gradients_of_pruned_weights_are_masked_after_it():
    model, optimizer, pruner = built("dpf")
    pruner.attach(optimizer)
    train(model, optimizer, range(15))
    model[0].weight.grad.fill_(1.0)
    pruner.mask_gradients()
    assert torch.equal(model[0].weight.grad, pruner.masks["0.weight"].float())


def test_a_schedule_that_goes_on_prunes_what_is_there():
    model, optimizer, pruner = built("dpf", stop=5)
    pruner.attach(optimizer)
    train(model, optimizer, range(5))
    early = pruner.masks
    train(model, optimizer, range(5, 15))
    assert pruner.finish().pruned == round(0.7 * early.size) > early.pruned
    assert pruner.masks & early == pruner.masks


def test_a_fraction_of_the_training():
    model, optimizer, pruner = built("str", stop=0.5)
    with pytest.raises(InputError, match=r"str\(every=2, stop=0\.5\) ends after a fraction.*call over\(total_steps\)"):
        pruner.attach(optimizer)
    assert METHODS["str"](0.5).over(30) == METHODS["str"](15)
    assert METHODS["str"](None).over(30) == METHODS["str"](None)
    model, optimizer, pruner = built("str", stop=0.5)
    pruner.over(30)
    pruner.attach(optimizer)
    train(model, optimizer, range(15))
    assert pruner.state_dict()["withheld"]["seen"] == []


@pytest.mark.parametrize("kind", METHODS)
def test_bad_input(kind):
    for stop in (0.0, 1.5, -1.0):
        with pytest.raises(InputError, match=r"give a fraction of the training, up to 1\.0, or steps without a point"):
            METHODS[kind](stop)
    with pytest.raises(InputError, match="never moves a mask: give an every that is less than stop"):
        METHODS[kind](1)
    with pytest.raises(InputTypeError, match=r"give a step, or a fraction of the training"):
        METHODS[kind]("end")
    with pytest.raises(InputTypeError, match=r"give a number of steps"):
        sc.feedback.dpf(every=1.5)
