"""Convolutional networks, and what is done to channels between convolutions."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from structure.architectures import architecture


def images(channels=3, size=12, batch=2):
    return (torch.randn(batch, channels, size, size),)


def conv(i, o, kernel=3, stride=1, **options):
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(o), nn.ReLU())


def head(i):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 10))


@architecture
def plain_convolutions(w):
    body = conv(3, w(12)), nn.MaxPool2d(2), conv(w(12), w(24)), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(9 * w(24), w(32)), nn.ReLU(), nn.Dropout(), nn.Linear(w(32), 10)), images()


class Residual(nn.Module):
    def __init__(self, i, o, stride, inner=None, inplace=False):
        super().__init__()
        inner = inner or o
        self.body = nn.Sequential(conv(i, inner, 3, stride), nn.Conv2d(inner, o, 3, padding=1), nn.BatchNorm2d(o))
        self.short = nn.Identity() if stride == 1 and i == o else nn.Conv2d(i, o, 1, stride)
        self.inplace = inplace

    def forward(self, x):
        y = self.body(x)
        if self.inplace:
            y += self.short(x)
            return F.relu_(y)
        return F.relu(y + self.short(x))


def residual(w, **options):
    a, b = w(16), w(32)
    blocks = Residual(a, a, 1, **options), Residual(a, b, 2, **options), Residual(b, b, 1, **options)
    return nn.Sequential(conv(3, a), *blocks, head(b))


@architecture
def residual_network(w):
    return residual(w), images()


@architecture
def residual_bottlenecks_in_place(w):
    return residual(w, inner=w(8), inplace=True), images()


class Inverted(nn.Module):
    def __init__(self, i, o, inner):
        super().__init__()
        wide = conv(i, inner, 1), conv(inner, inner, groups=inner)
        self.body = nn.Sequential(*wide, nn.Conv2d(inner, o, 1), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.body(x)
        return x + y if x.shape == y.shape else y


@architecture
def inverted_residuals(w):
    a, b = w(12), w(16)
    body = Inverted(a, a, 4 * a), Inverted(a, b, 4 * a), Inverted(b, b, 4 * b)
    return nn.Sequential(conv(3, a, stride=2), *body, conv(b, w(48), 1), head(w(48))), images()


@architecture
def grouped_convolutions(w):
    a = 4 * w(8)
    return nn.Sequential(conv(3, a), conv(a, a, groups=4), conv(a, a, 1), head(a)), images()


@architecture
def densely_connected(w):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, w(16), 3, padding=1)
            self.layers = nn.ModuleList(conv(w(16) + k * w(8), w(8)) for k in range(3))
            self.last = conv(w(16) + 3 * w(8), w(16), 1)
            self.head = head(w(16))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return self.head(self.last(x))

    return Dense(), images()


@architecture
def generator(w):
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, w(32) * 16)
            up = nn.ConvTranspose2d(w(32), w(16), 4, 2, 1), nn.BatchNorm2d(w(16)), nn.ReLU()
            self.up = nn.Sequential(nn.BatchNorm2d(w(32)), nn.ReLU(), *up, nn.ConvTranspose2d(w(16), 3, 3, 1, 1))

        def forward(self, z):
            return torch.tanh(self.up(self.first(z).view(len(z), -1, 4, 4)))

    return Generator(), (torch.randn(2, 16),)


@architecture
def grouped_transposed_convolutions(w):
    a = 2 * w(12)
    up = nn.ConvTranspose2d(a, a, 2, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(a, a, 2, 2, groups=a)
    return nn.Sequential(conv(3, a), *up, nn.ReLU(), nn.Conv2d(a, 3, 1)), images(size=6)


@architecture
def group_norms(w):
    a, b = 4 * w(8), 4 * w(12)
    first = nn.Conv2d(3, a, 3, padding=1), nn.GroupNorm(4, a), nn.SiLU()
    return nn.Sequential(*first, nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(4, b), nn.SiLU(), head(b)), images()


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels, inner):
        super().__init__()
        self.down, self.up = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x):
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


@architecture
def squeeze_and_excite(w):
    a, b = w(16), w(32)
    return nn.Sequential(conv(3, a), Gate(a, w(8)), conv(a, b, stride=2), Gate(b, w(8)), head(b)), images()


@architecture
def one_dimensional(w):
    class Signal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv1d(4, w(16), 5, padding=2), nn.InstanceNorm1d(w(16), affine=True)
            self.slope, self.second = nn.PReLU(w(16)), nn.Conv1d(w(16), w(24), 5, padding=2)
            self.last, self.out = nn.PReLU(w(24)), nn.Linear(w(24), 5)

        def forward(self, x):
            x = self.last(self.second(self.slope(self.norm(self.first(x)))))
            return self.out(F.avg_pool1d(x, x.shape[-1]).squeeze(-1))

    return Signal(), (torch.randn(2, 4, 20),)


@architecture
def volumes(w):
    body = nn.Conv3d(2, w(8), 3, padding=1), nn.BatchNorm3d(w(8)), nn.ReLU(), nn.MaxPool3d(2)
    last = nn.Conv3d(w(8), w(16), 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    return nn.Sequential(*body, *last, nn.Linear(w(16), 4)), (torch.randn(2, 2, 6, 6, 6),)


@architecture
def shuffled_channels(w):
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = conv(3, 2 * w(12)), nn.Sequential(conv(w(12), w(12), 1), conv(w(12), w(12)))
            self.last, self.head = conv(2 * w(12), w(24), 1), head(w(24))

        def forward(self, x):
            a, b = self.stem(x).chunk(2, 1)
            y = torch.cat([a, self.branch(b)], 1)
            n, c, *space = y.shape
            y = y.view(n, 2, c // 2, *space).transpose(1, 2).reshape(n, c, *space)
            return self.head(self.last(y))

    return Shuffle(), images()


@architecture
def split_and_joined(w):
    """A part of the channels goes through a chain of convolutions; all stages are joined."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = w(12)
            self.first, self.body = conv(3, 2 * w(12), 1), nn.ModuleList(conv(w(12), w(12)) for _ in range(2))
            self.last, self.head = conv(4 * w(12), w(24), 1), head(w(24))

        def forward(self, x):
            parts = list(self.first(x).split((self.part, self.part), 1))
            for layer in self.body:
                parts.append(layer(parts[-1]))
            return self.head(self.last(torch.cat(parts, 1)))

    return Split(), images()


@architecture
def encoder_and_decoder_with_skips(w):
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = conv(3, w(12)), conv(w(12), w(24))
            self.up = nn.ConvTranspose2d(w(24), w(12), 2, 2)
            self.back, self.out = conv(2 * w(12), w(12)), nn.Conv2d(w(12), 2, 1)

        def forward(self, x):
            a = self.one(x)
            b = self.two(F.max_pool2d(a, 2))
            return self.out(self.back(torch.cat([self.up(b), F.interpolate(a, scale_factor=1.0)], 1)))

    return UNet(), images()


@architecture
def standardised_weights(w):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight
            mean, spread = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
            return self._conv_forward(x, (weight - mean) / (spread + 1e-5), None)

    a, b = w(16), w(24)
    first, second = Standardised(3, a, 3, bias=False), Standardised(a, b, 3, bias=False)
    body = first, nn.BatchNorm2d(a), nn.ReLU(), second, nn.BatchNorm2d(b), nn.ReLU()
    return nn.Sequential(*body, head(b)), images()


@architecture
def weight_norm(w):
    norm = parametrizations.weight_norm
    body = norm(nn.Conv1d(3, w(16), 3)), nn.ReLU(), norm(nn.Conv1d(w(16), w(24), 3)), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(w(24), 4)), (torch.randn(2, 3, 16),)


@architecture
def global_response(w):
    """Channels are scaled by their share of the mean of all, by hand."""

    class Response(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide, self.narrow = nn.Conv2d(3, w(12), 3), nn.Linear(w(12), w(32)), nn.Linear(w(32), w(12))
            self.gain, self.shift = nn.Parameter(torch.ones(w(32))), nn.Parameter(torch.zeros(w(32)))
            self.out = nn.Linear(w(12), 10)

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1)
            y = F.gelu(self.wide(x))
            size = y.norm(dim=(1, 2), keepdim=True)
            y = y + self.gain * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.shift
            return self.out((x + self.narrow(y)).mean((1, 2)))

    return Response(), images()


@architecture
def pixels_from_channels(w):
    body = conv(3, w(16)), conv(w(16), 4 * w(8)), nn.PixelShuffle(2), conv(w(8), w(16))
    return nn.Sequential(*body, nn.Conv2d(w(16), 12, 1), nn.PixelShuffle(2)), images(size=6)


@architecture
def two_inputs_two_outputs(w):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.image = nn.Sequential(conv(3, w(16)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.table, self.mix = nn.Sequential(nn.Linear(7, w(24)), nn.ReLU()), nn.Linear(w(16) + w(24), w(24))
            self.kind, self.price = nn.Linear(w(24), 5), nn.Linear(w(24), 1)

        def forward(self, batch):
            z = F.relu(self.mix(torch.cat([self.image(batch["image"]), self.table(batch["table"])], 1)))
            return {"kind": self.kind(z), "price": self.price(z)}

    return Both(), ({"image": images()[0], "table": torch.randn(2, 7)},)


@architecture(least=0.7)
def training_only_branch(w):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3, w(16)), conv(w(16), w(24))
            self.side, self.head = head(w(16)), head(w(24))

        def forward(self, x):
            x = self.first(x)
            main = self.head(self.second(x))
            return (main, self.side(x)) if self.training else main

    return Auxiliary(), images()


@architecture
def selected_kernels(w):
    """A softmax over two branches weighs their channels."""

    class Selected(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, w(16))
            self.near, self.far = conv(w(16), w(16)), conv(w(16), w(16), dilation=1)
            self.down, self.up = nn.Linear(w(16), w(8)), nn.Linear(w(8), 2 * w(16))
            self.head = head(w(16))

        def forward(self, x):
            x = self.stem(x)
            both = torch.stack([self.near(x), self.far(x)], 1)
            share = self.up(F.relu(self.down(both.sum(1).mean((2, 3)))))
            share = share.view(len(x), 2, -1, 1, 1).softmax(1)
            return self.head((both * share).sum(1))

    return Selected(), images()


@architecture
def spectral_norm(w):
    layer = nn.utils.parametrizations.spectral_norm
    body = layer(nn.Conv2d(3, w(8), 4, 2, 1)), nn.LeakyReLU(0.2), layer(nn.Conv2d(w(8), 2 * w(8), 4, 2, 1)), nn.ReLU()
    return nn.Sequential(*body, nn.Flatten(), layer(nn.Linear(2 * w(8) * 9, 1))), images()


@architecture
def involution(w):
    class Involution(nn.Module):
        """Li et al. 2021: each place has a kernel of its own, made from its channels."""

        def __init__(self):
            super().__init__()
            self.groups, self.unfold = w(4), nn.Unfold(3, padding=1)
            self.first, self.norm = nn.Conv2d(3, 4 * w(4), 3), nn.BatchNorm2d(4 * w(4))
            self.squeeze, self.make = nn.Conv2d(4 * w(4), 4, 1), nn.Conv2d(4, 9 * w(4), 1)
            self.out = nn.Linear(4 * w(4), 5)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            b, c, h, w = x.shape
            kernels = self.make(F.relu(self.squeeze(x))).view(b, self.groups, 1, 9, h, w)
            near = self.unfold(x).view(b, self.groups, -1, 9, h, w)
            return self.out((kernels * near).sum(3).view(b, c, h, w).mean((2, 3)))

    return Involution(), images()


@architecture
def denoising_network(w):
    class Block(nn.Module):
        def __init__(self, inputs, outputs, time):
            super().__init__()
            self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), conv3(outputs)
            self.norm, self.time, self.skip = nn.GroupNorm(2, outputs), nn.Linear(time, 2 * outputs), None
            if inputs != outputs:
                self.skip = nn.Conv2d(inputs, outputs, 1)

        def forward(self, x, t):
            scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, 1)
            y = self.second(F.silu(self.norm(self.first(x)) * (1 + scale) + shift))
            return y + (x if self.skip is None else self.skip(x))

    def conv3(channels):
        return nn.Conv2d(channels, channels, 3, padding=1)

    class UNet(nn.Module):
        """Diffusion: a time that scales and shifts, attention to words, skips."""

        def __init__(self):
            super().__init__()
            c, self.heads = 2 * w(8), w(4)
            self.size, self.time = c, nn.Sequential(nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, 2 * c))
            self.first, self.down, self.mid = nn.Conv2d(3, c, 3, padding=1), Block(c, c, 2 * c), Block(c, c, 2 * c)
            self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(6, c), nn.Linear(6, c)
            self.o, self.up, self.last = nn.Linear(c, c), Block(2 * c, c, 2 * c), nn.Conv2d(c, 3, 3, padding=1)

        def attend(self, x, words):
            b, c, h, w = x.shape
            q = self.q(x.flatten(2).transpose(1, 2))
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, self.k(words), self.v(words)))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
            return x + self.o(y).transpose(1, 2).reshape(b, c, h, w)

        def forward(self, x, t, words):
            angles = t[:, None] * torch.exp(-torch.arange(self.size // 2) / 3)
            t = self.time(torch.cat([angles.cos(), angles.sin()], -1))
            x = self.first(x)
            y = self.attend(self.mid(F.max_pool2d(self.down(x, t), 2), t), words)
            return self.last(self.up(torch.cat([F.interpolate(y, scale_factor=2), x], 1), t))

    return UNet(), (*images(size=8), torch.rand(2), torch.randn(2, 5, 6))
