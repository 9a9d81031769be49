"""Models with zeros, their sparse copies without any tuning, how far results are apart, and memory that ends."""

import copy
import ctypes
import mmap

import torch

from models import Mlp
from secateur.runtime import candidates, products, tuning

PAGE = mmap.PAGESIZE


class Apart(Mlp):
    """Its layers run each on its own, as its forward does more than they."""

    def forward(self, x):
        return super().forward(x) + 0


def thin(model, sparsity=0.9, seed=0):
    """Zero a random share of each weight matrix, with some empty rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
                parameter[::7] = 0
    return model.eval()


def without_negative_zeros(model):
    """The model, whose weights can be released: what is packed has each bit of them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)
    return model


def image_batches(batch, channels, height, width):
    """Batches of images in the layouts in which they come, by name."""
    plain, last = torch.randn(batch, channels, height, width), {"memory_format": torch.channels_last}
    return {
        "first": plain,
        "last": plain.to(**last),
        "moved": plain.movedim(1, -1).contiguous().movedim(-1, 1),
        "each second channel": torch.randn(batch, 2 * channels, height, width).to(**last)[:, ::2],
        "turned": torch.randn(batch, channels, width, height).transpose(2, 3),
        "expanded": plain[:1].to(**last).expand(batch, -1, -1, -1),
        "batch within": torch.randn(height, channels, batch, width).permute(2, 1, 0, 3),
    }


def assert_copies_give_the_same(make, fast, x):
    """So do copies of copies."""
    reference = fast(x)
    assert make(fast)(x).equal(reference)
    assert make(make(fast))(x).equal(reference)


def assert_alike(one, other):
    """Both have modules of the same classes, with attributes of the same names: nothing of ours is left."""
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert [sorted(vars(m)) for m in one.modules()] == [sorted(vars(m)) for m in other.modules()]


def sparse(model):
    """A copy in which every layer that can be is sparse for all inputs."""
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    modules = dict(fast.named_modules())
    for plan in candidates.survey(fast):
        if not plan.reason:
            layer = candidates.make_sparse(modules[plan.name], plan.name)
            layer.pack()
            layer._choices = products.ALL
    candidates.enclose(fast)
    return fast


def off(got, reference):
    """Largest error over largest value; 0 for empty ones."""
    assert got.shape == reference.shape
    if not got.numel():
        return 0.0
    error = (got.double() - reference.double()).abs().max() / reference.double().abs().max().clamp_min(1e-30)
    return error.item()


def fake_times(monkeypatch, times):
    """Have `times(name, bucket)` for what tuning would measure."""

    def measured(model, given):
        rows = [(one.name, one.layer.rows(*args, **kwargs)) for one, args, kwargs in given]
        return {(name, products.bucket(n)): times(name, products.bucket(n)) for name, n in rows}

    monkeypatch.setattr(tuning, "times", measured)


class Guarded:
    """Memory for a tensor, behind which no byte may be touched."""

    def __init__(self, shape, filled=None):
        count = torch.Size(shape).numel()
        pages = -(-4 * count // PAGE)
        self.memory = mmap.mmap(-1, (pages + 1) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert libc.mprotect(address + pages * PAGE, PAGE, 0) == 0
        self.tensor = torch.frombuffer(self.memory, dtype=torch.float32, count=count, offset=pages * PAGE - 4 * count)
        self.tensor = self.tensor.view(shape)
        self.tensor.copy_(torch.full(shape, float("nan")) if filled is None else filled)
