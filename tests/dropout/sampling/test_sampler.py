"""The handler that samples: what it gives to a call, alone and with what comes before it played back."""

from contextlib import suppress

import torch
from torch import nn

from secateur.dropout.interception.handlers import DropoutCall, handling
from secateur.dropout.sampling.generators import Streams
from secateur.dropout.sampling.prefix import Boundary, Prefix
from secateur.dropout.sampling.sampler import Sampler
from secateur.dropout.sampling.strategies import Alone

X = torch.ones(3, 8)
CALLS = [DropoutCall("1", "dropout", 0.5, X.shape, seen=0.5)]


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()


def run(net, sampler):
    with torch.no_grad(), handling(sampler):
        return net(X)


def sampler(**options):
    return Sampler(Alone(Streams(0, [3])), CALLS, **options)


def test_the_masks_of_a_sample():
    net = model()
    got, again = run(net, sampler()), run(net, sampler())
    assert torch.equal(got, again)
    numbers = Streams(0, [3]).draw(X.shape, X.device)[0]
    assert torch.equal(got, net[0](X) * (numbers >= 0.5) * 2)


def test_shared_masks_repeat_along_the_batch():
    calls = [DropoutCall("1", "dropout", 0.5, X.shape, seen=0.5, repeats=(3, 1))]
    got = run(nn.Sequential(nn.Dropout(0.5)).eval(), Sampler(Alone(Streams(0, [3])), calls, shared=True))
    assert torch.equal(got, got[:1].expand_as(got))


def test_what_comes_before_is_recorded_and_played():
    net, prefix = model(), Prefix()
    right = run(net, sampler())
    with suppress(Boundary):
        run(net, sampler(prefix=prefix))
    assert prefix.closed
    prefix.rewind()
    with torch.no_grad():
        net[0].weight.zero_()  # what is played is not computed again
    assert torch.equal(run(net, sampler(prefix=prefix)), right)
