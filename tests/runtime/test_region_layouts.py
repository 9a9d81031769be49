"""What a region gives lies in memory as torch's own result does, whatever goes in and whatever stands in the region."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from networks_by_hand import Basic, as_one, lively
from secateur.runtime.region_layouts import elementwise
from sparse_models import image_batches, off

LAST = {"memory_format": torch.channels_last}


SHAPES = (2, 4, 6, 5), (1, 4, 6, 5), (2, 1, 6, 5), (2, 4, 1, 1), (1, 1, 1, 1), (2, 4, 1, 5)


def unread(*given):
    return [torch.empty_strided(image.shape, image.stride(), device="meta") for image in given]


@pytest.mark.parametrize("shape", SHAPES)
def test_results_of_torchs_iterator(shape):
    for name, image in image_batches(*shape).items():
        assert elementwise(*unread(image)).stride() == image.sigmoid().stride(), name
        for other in image_batches(*shape).values():
            assert elementwise(*unread(image, other)).stride() == (image + other).stride(), name
        for gate in image_batches(*shape[:2], 1, 1).values():
            assert elementwise(*unread(image, gate)).stride() == (image * gate).stride(), name
            assert elementwise(*unread(gate, image)).stride() == (gate * image).stride(), name


class Between(nn.Module):
    """Something between convolutions to some number of channels and back."""

    def __init__(self, between, width=4):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 8, 3, padding=1)
        self.same, self.between = nn.Conv2d(4, 4, 1), between

    def forward(self, x):
        return self.leave(self.between(self, self.enter(x), x))


def in_place(net, y, x):
    y += net.same(x)
    return y


def gated(net, y, x):
    return y * net.same(F.adaptive_avg_pool2d(y, 1)).sigmoid()


def gated_by_a_mean(net, y, x):
    return net.same(y.mean((2, 3), keepdim=True)).sigmoid() * y


WAYS = {
    "nothing": lambda net, y, x: y,
    "an activation": lambda net, y, x: y.relu(),
    "clipped": lambda net, y, x: F.relu6(y),
    "in place": lambda net, y, x: y.relu_(),
    "maxima": lambda net, y, x: F.max_pool2d(y, 2, 1, 1).relu(),
    "averages": lambda net, y, x: F.avg_pool2d(y, 2, 1, 1),
    "one pixel": lambda net, y, x: F.adaptive_avg_pool2d(y, 1),
    "a mean": lambda net, y, x: y.mean((2, 3), keepdim=True),
}
OF_FOUR = {
    "added": lambda net, y, x: y + net.same(x),
    "added to": lambda net, y, x: x + net.same(y),
    "added in place": in_place,
    "a gate": gated,
    "a gate of means": gated_by_a_mean,
}


def assert_laid_as_torchs(model, calls, channels=4, fast=None):
    fast = as_one(model) if fast is None else fast
    for batch, _, height, width in SHAPES:
        for name, x in image_batches(batch, channels, height, width).items():
            calls.clear()
            with torch.inference_mode():
                got, wanted = fast(x), model(x)
            assert calls, name
            assert got.stride() == wanted.stride(), (name, x.shape, x.stride())
            assert off(got, wanted) <= 1e-5


@pytest.mark.parametrize(("name", "width"), [(name, width) for name in WAYS for width in (1, 4)])
def test_whatever_is_between(network_calls, name, width):
    assert_laid_as_torchs(lively(Between(WAYS[name], width)), network_calls)


@pytest.mark.parametrize("name", OF_FOUR)
def test_whatever_is_made_of_two(network_calls, name):
    assert_laid_as_torchs(lively(Between(OF_FOUR[name])), network_calls)


@pytest.mark.parametrize("place", range(3))
def test_weights_of_which_one_has_its_channels_last(network_calls, place):
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1), nn.ReLU())
    model = lively(nn.Sequential(*model, nn.Conv2d(2, 4, 3, padding=1)))
    fast = as_one(model)
    assert_laid_as_torchs(model, network_calls, fast=fast)
    for one in (model, fast):  # after a call: what was known is not used again
        one[2 * place].to(**LAST)
    assert_laid_as_torchs(model, network_calls, fast=fast)


def test_grey_images(network_calls):
    for model in (nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), Basic(1, 4, 2)):
        for last in ({}, LAST):
            assert_laid_as_torchs(lively(copy.deepcopy(model)).to(**last), network_calls, channels=1)


def test_it_starts_with_what_is_no_convolution(network_calls):
    class Late(Between):
        def forward(self, x):
            x = x.sigmoid()
            return x + self.same(self.between(self, self.enter(x), x))

    assert_laid_as_torchs(lively(Late(lambda net, y, x: y.relu())), network_calls)


def test_views_behind_a_network_of_one_channel_between(network_calls, sparse_wins):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            body = nn.Conv2d(8, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 8, 3, padding=1)
            self.body, self.head = nn.Sequential(*body), nn.Linear(8 * 36, 4)

        def forward(self, x):
            return self.head(self.body(x).view(x.shape[0], -1))

    model, x = lively(Views()), torch.randn(2, 8, 6, 6)
    fast = sc.accelerate(model, x)
    network_calls.clear()
    with torch.inference_mode():
        assert off(fast(x.to(**LAST)), model(x.to(**LAST))) <= 1e-5
    assert network_calls


def test_layouts_are_not_kept_for_ever_more_sizes(network_calls):
    model = lively(Basic(4, 4))
    fast = as_one(model)
    for width in range(1, 300):
        x = torch.randn(1, 4, 2, width).to(**LAST)
        with torch.inference_mode():
            assert fast(x).stride() == model(x).stride()
    assert len(network_calls) == 299
    assert len(fast._secateur_network.found(fast).bound()._strides) <= 256
