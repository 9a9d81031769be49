"""secateur.pruner: the model that is there, and what became of it."""

import warnings

import torch

import secateur as sc
from secateur.errors import InputError, MaskError, StateError
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
