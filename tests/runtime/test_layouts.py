"""Images have the layout that torch's own convolutions give them, and come to the kernels whatever theirs is."""

import copy
import io

import pytest
import torch
from torch import nn

import secateur as sc
from networks_by_hand import Basic, lively
from secateur.runtime import native
from secateur.runtime.layouts import channels_first, channels_last
from secateur.runtime.swapping import Sparse
from sparse_models import image_batches, off, sparse, thin

LAST = {"memory_format": torch.channels_last}


def images(*shape):
    return image_batches(*shape) | {"one picture": torch.randn(1, *shape[1:]).to(**LAST)[0]}


def strides(tensor):
    """Those that say where anything is."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 9), (2, 64, 17, 5), (3, 1, 6, 6), (2, 5, 1, 1), (1, 1, 1, 1), (2, 16, 33, 1)]
)
def test_an_image_with_its_channels_first(isa, shape):
    for name, image in images(*shape).items():
        if image.dim() == 4:
            found = channels_first(image)
            assert found.is_contiguous(), name
            assert found.equal(image), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("columns", [1, 16, 31, 64])
def test_the_native_transpose(isa, threads, rows, columns):
    x, y = torch.randn(3, rows, columns), torch.full((3, columns, rows), float("nan"))
    native.library().secateur_transpose(x.data_ptr(), 3, rows, columns, y.data_ptr(), threads)
    assert y.equal(x.transpose(1, 2))


def test_a_large_one_is_shared_among_threads(isa):
    x, y = torch.randn(2, 500, 300), torch.empty(2, 300, 500)
    native.library().secateur_transpose(x.data_ptr(), 2, 500, 300, y.data_ptr(), 2)
    assert y.equal(x.transpose(1, 2))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("channels", "width"), [((4, 8), 3), ((1, 4), 1), ((8, 1), 1), ((16, 16), 3)])
@pytest.mark.parametrize("weight", [{}, LAST])
@pytest.mark.parametrize("batch", [1, 2])
def test_results_have_the_strides_of_torchs(isa, kind, channels, width, weight, batch):
    two = kind in (nn.Conv2d, nn.ConvTranspose2d)
    if not two:  # torch makes a signal contiguous first, which leaves that of one channel as it is
        weight, channels = {}, (max(channels[0], 2), channels[1])
    layer = thin(kind(*channels, width), 0.5).to(**weight)
    fast = sparse(nn.Sequential(layer))[0]
    assert isinstance(fast, Sparse)
    for size in ((5, 7), (3, 3), (3, 1)) if width == 1 or two else ((1, 7), (1, 3)):
        if min(size) < width and two:
            continue
        for name, image in images(batch, channels[0], *size).items():
            x = image if two else image.squeeze(-2) if image.shape[-2] == 1 else image[..., 0, :]
            with torch.inference_mode():
                got, wanted = fast(x), layer(x)
            assert strides(got) == strides(wanted), (name, x.shape, x.stride())
            assert off(got, wanted) <= 1e-5


@pytest.mark.parametrize("weight", [{}, LAST])
def test_of_networks_too(isa, network_calls, sparse_wins, weight):
    body = lively(nn.Sequential(Basic(3, 4), Basic(4, 8, 2))).to(**weight)
    x = torch.randn(2, 3, 16, 16)
    fast = sc.accelerate(body, x)
    network_calls.clear()
    for given in (x, x.to(**LAST)):
        with torch.inference_mode():
            got, wanted = fast(given), body(given)
        assert strides(got) == strides(wanted)
        assert off(got, wanted) <= 1e-5
    assert network_calls


def test_views_that_work_behind_torchs_work_behind_ours(sparse_wins):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x, last):
            x = self.conv(x)
            return x.permute(0, 2, 3, 1).view(-1, 8) if last else x.view(len(x), -1)

    model, x = thin(Views(), 0.5), torch.randn(2, 4, 9, 9)
    fast = sc.accelerate(model, (x, False))
    assert isinstance(fast.conv, Sparse)
    for one in (fast, copy.deepcopy(fast)):
        with torch.inference_mode():
            assert off(one(x, False), model(x, False)) <= 1e-5
            assert off(one(x.to(**LAST), True), model(x.to(**LAST), True)) <= 1e-5


def test_compiled_and_exported_it_computes_the_same(sparse_wins):
    model, x = thin(nn.Sequential(nn.Conv2d(4, 8, 3)), 0.5), torch.randn(2, 4, 9, 9).to(**LAST)
    fast, file = sc.accelerate(model, x), io.BytesIO()
    torch.compiler.reset()
    torch.export.save(torch.export.export(fast, (x,)), file)
    file.seek(0)
    with torch.inference_mode():
        for one in (torch.compile(fast, fullgraph=True, backend="aot_eager"), torch.export.load(file).module()):
            assert off(one(x), model(x)) <= 1e-5


def test_without_the_library_torch_turns_them(without_native):
    image = torch.randn(2, 3, 4, 5).to(**LAST)
    assert channels_first(image).equal(image)
    assert not channels_last(channels_first(image))
