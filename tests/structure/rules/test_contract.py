import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), 2),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), 2),
        (nn.Conv2d(16, 16, 3, padding=1, groups=4), 2),
        (nn.ConvTranspose2d(16, 16, 3, padding=1), 2),
        (nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4), 2),
        (nn.Conv1d(16, 16, 3, padding=1), 1),
        (nn.Conv3d(16, 16, 3, padding=1), 3),
    ],
)
def test_convolutions(layer, kernel):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kernel - 1]
    model = nn.Sequential(conv(3, 16, 1), nn.ReLU(), layer, nn.ReLU(), conv(16, 5, 1)).eval()
    small = sc.shrink(model, torch.randn(2, 3, *[5] * kernel), 0.5)
    assert small[2].in_channels == small[2].out_channels == 8
    assert sum(p.numel() for p in small.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())


class Product(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.w, self.c = nn.Linear(6, 16), nn.Parameter(torch.randn(16, 12)), nn.Linear(12, 3)
        self.function = function

    def forward(self, x):
        return self.c(self.function(self.a(x), self.w))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, w: y @ w,
        lambda y, w: torch.einsum("bi,io->bo", y, w),
        lambda y, w: torch.einsum("...i,io", y, w),
        lambda y, w: torch.addmm(torch.zeros(w.shape[1]), y, w),
        lambda y, w: torch.addbmm(torch.zeros(w.shape[1]), y[None], w[None]),
        lambda y, w: torch.baddbmm(torch.zeros(1), y[None], w[None])[0],
        lambda y, w: torch.stack([torch.addmv(w[0], w.t(), row) for row in y]),
        lambda y, w: torch.bmm(y[None], w[None])[0],
        lambda y, w: torch.tensordot(y, w, 1),
        lambda y, w: torch.tensordot(y, w, ([1], [0])),
        lambda y, w: torch.inner(y, w.t()),
        lambda y, w: torch.cdist(y, w.t()),
        lambda y, w: F.cosine_similarity(y[:, :, None], w[None], 1),
        lambda y, w: F.bilinear(y, y, torch.einsum("io,jo->oij", w, w)),
        lambda y, w: torch.stack([torch.mv(w.t(), row) + torch.outer(row, w[0])[0] for row in y]),
    ],
)
def test_products(function):
    torch.manual_seed(0)
    small = sc.shrink(Product(function).eval(), torch.randn(4, 6), 0.5)
    assert small.w.shape == (8, 6)


def test_tied_embeddings_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9, bias=False)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    small = sc.shrink(Tied().eval(), torch.randint(0, 9, (2, 5)), 0.5)
    assert small.c.weight is small.a.weight
    assert small.a.weight.shape == (9, 8)
    assert small.a.embedding_dim == 8


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_products_keep_multiples_of_16_bytes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 16), nn.Linear(24, 3)
            self.w = nn.Parameter(torch.randn(2, 16, 24))

        def forward(self, x):
            ends = torch.tensor([3, 8], dtype=torch.int32)
            return self.c(nn.functional.grouped_mm(self.a(x), self.w, offs=ends))

    small = sc.shrink(Experts().eval(), torch.randn(8, 6), 0.3)
    assert small.w.shape == (2, 12, 16)


def test_distances_are_sums_over_units():
    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(5, 16)

        def forward(self, x, y):
            x, y = self.a(x), self.b(y)
            return F.pairwise_distance(x, y), torch.vdot(x[0], y[0])

    torch.manual_seed(0)
    small = sc.shrink(Near().eval(), (torch.randn(4, 6), torch.randn(4, 5)), 0.5)
    assert small.a.out_features == small.b.out_features == 8


def test_bags_of_words():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(9, 16, mode="mean"), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.bag(x))

    small = sc.shrink(Bags().eval(), torch.randint(0, 9, (2, 5)), 0.5)
    assert small.bag.embedding_dim == small.out.in_features == 8


class Places(nn.Module):
    """Units [batch, 1 or channels, times, units] before a convolution."""

    def __init__(self, conv, channels=1):
        super().__init__()
        self.a, self.conv, self.channels = nn.Linear(6, 16), conv, channels

    def forward(self, x):
        return self.conv(self.a(x).unsqueeze(1).expand(-1, self.channels, -1, -1)).square().mean(-1)


@pytest.mark.parametrize(
    ("conv", "left", "kernel"),
    [
        (nn.Conv2d(1, 4, (2, 16)), 8, (2, 8)),
        (nn.Conv2d(3, 4, 1), 8, (1, 1)),
        (nn.Conv2d(1, 4, (3, 1)), 8, (3, 1)),
    ],
)
def test_a_kernel_of_all_places_or_of_one_lets_places_go(conv, left, kernel):
    torch.manual_seed(0)
    small = sc.shrink(Places(conv, conv.in_channels).eval(), torch.randn(2, 5, 6), 0.5)
    assert small.a.out_features == left
    assert small.conv.kernel_size == tuple(small.conv.weight.shape[2:]) == kernel


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(1, 4, (1, 3)), nn.Conv2d(1, 4, 1, padding=(0, 1)), nn.Conv2d(1, 4, (1, 16), padding=(0, 1))]
)
def test_places_in_windows_stay(conv):
    with pytest.raises(sc.errors.StructureError, match=r"conv2d in conv.* Change the code at that place"):
        sc.shrink(Places(conv).eval(), torch.randn(2, 5, 6), 0.5)
