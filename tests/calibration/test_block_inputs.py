"""Blocks that are passed by, and what they are called with."""

import pytest
import torch
from torch import nn

from secateur.calibration.block_chains import course
from secateur.calibration.block_inputs import Key, Link, record, run_until, standing_in
from secateur.errors import InputError


class Biased(nn.Module):
    """As a block of T5: the first one makes what the others take over."""

    def __init__(self, first):
        super().__init__()
        self.fc, self.first = nn.Linear(4, 4), first

    def forward(self, x, mask, bias=None, *, flag=False):
        bias = self.fc.weight.sum() if self.first else bias
        return self.fc(x) * mask + bias, None, bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Biased(at == 0) for at in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x, skip=False, order=(0, 1, 2)):
        hidden, bias, mask = self.embed(x), None, x[:, :1] > 0
        for at in order if not skip else order[:-1]:
            hidden, _, bias = self.blocks[at](hidden, mask, bias=bias, flag=at == 1)
        return self.head(hidden)


def made():
    torch.manual_seed(0)
    model = Model().eval()
    batch = (torch.randn(5, 3),), {}
    return model, batch, course(model, batch).chains[0]


def test_each_call_and_its_links():
    model, batch, chain = made()
    found = record(model, batch, chain)
    assert [call.leaves for call in found.calls] == [
        (Key(0), Key(1), None, False),
        (Link(0, 0), Key(1), Link(0, 2), True),
        (Link(1, 0), Key(1), Link(1, 2), False),
    ]
    assert [found.marks(at) for at in range(3)] == [block.taken for block in chain]
    torch.testing.assert_close(found.tensors["0"], model.embed(batch[0][0]))
    with torch.no_grad():
        tensors = dict(found.tensors)
        for at, call in enumerate(found.calls):
            args, kwargs = call.arguments(tensors)
            out = model.blocks[at](*args, **kwargs)
            tensors |= {f"{at}.0": out[0], f"{at}.2": out[2]}
        assert torch.equal(model.head(out[0]), model(*batch[0]))


@pytest.mark.parametrize(("keywords", "name"), [({"skip": True}, "blocks.2"), ({"order": (0, 2, 1)}, "blocks.2")])
def test_a_batch_that_goes_another_way_is_refused(keywords, name):
    model, (args, _), chain = made()
    with pytest.raises(InputError, match=f"{name} does not run in this batch .* or leave out sequential"):
        record(model, (args, keywords), chain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_ends_where_it_is_told_to():
    model, batch, _ = made()
    seen = []
    for module in (model.embed, model.blocks[0], model.head):
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    run_until(model, batch, model.blocks[1])
    assert seen == [model.embed, model.blocks[0]]
    run_until(model, batch, None)
    assert seen[2:] == [model.embed, model.blocks[0], model.head]


def test_a_forward_of_its_own_comes_back():
    model = made()[0]

    def own(x):
        return x[:, :2]

    model.head.forward = own
    with standing_in({model.head: lambda x: x, model.embed: lambda x: x}):
        assert model.head.forward(1) == 1
    assert model.head.forward is own
    assert "forward" not in vars(model.embed)
