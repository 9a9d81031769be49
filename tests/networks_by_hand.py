"""Models of convolutions, written as people write them, and the steps of a network computed by torch."""

import torch
from torch import nn
from torch.nn import functional as F

from secateur.runtime import networks, products
from secateur.runtime.operations import AVERAGES, CONVOLUTION, MAXIMA
from sparse_models import sparse, thin

_ACTIVATIONS = (
    *(lambda v: v, F.relu, F.relu6, F.gelu, lambda v: F.gelu(v, approximate="tanh"), F.silu),
    *(torch.tanh, torch.sigmoid, F.hardswish, F.hardsigmoid),
)


def as_one(model):
    """A copy whose layers are all sparse, and whose networks all run as one call."""
    fast = sparse(model)
    for module, program in dict(networks.networks(fast)).values():
        networks.install(module, program.words, products.ALL)
    return fast


def lively(model, seed=0):
    """With running statistics, scales and shifts that are not the first ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return thin(model, 0.7)


def by_torch(steps, x):
    """What a network's steps give, one after the other."""
    values = [x]
    for step in steps:
        out = values[step.source]
        window = step.window
        if step.kind == CONVOLUTION:
            out = type(step.layer).plain.forward(step.layer, out)
        elif step.kind == MAXIMA:
            out = F.max_pool2d(out, window.size, window.stride, window.padding, window.dilation)
        elif step.kind == AVERAGES:
            size = window.size or out.shape[2:]
            out = F.avg_pool2d(out, size, window.stride, window.padding, count_include_pad=window.counted)
        if step.norm is not None:
            out = step.norm(out)
        if step.times >= 0:
            out = out * values[step.times]
        if step.add >= 0:
            out = out + values[step.add]
        values.append(_ACTIVATIONS[step.activation](out))
        assert step.to == len(values) - 1
    return values[-1]


class Basic(nn.Module):
    """A block of ResNet-18."""

    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, width, out, stride=1):
        super().__init__()
        mid = out // 4
        self.conv1, self.bn1 = nn.Conv2d(width, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """The usual one, of any block, width and depth."""

    def __init__(self, block=Basic, widths=(8, 16), depth=2, classes=5):
        super().__init__()
        first = widths[0]
        self.conv1 = nn.Conv2d(3, first, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(first), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        stages, before = [], first
        for i, width in enumerate(widths):
            blocks = [block(before, width, 2 if i else 1), *(block(width, width) for _ in range(depth - 1))]
            stages.append(nn.Sequential(*blocks))
            before = width
        self.stages = nn.ModuleList(stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, width, out, stride=1, expand=3):
        super().__init__()
        mid = width * expand
        self.residual = stride == 1 and width == out
        self.conv = nn.Sequential(
            nn.Conv2d(width, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6(inplace=True),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False), nn.BatchNorm2d(mid), nn.ReLU6(inplace=True),
            nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


def mobile():
    """A small MobileNetV2, with the mean as the pool of everything."""
    blocks = (Inverted(8, 8), Inverted(8, 12, 2), Inverted(12, 12))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), *blocks, nn.AdaptiveAvgPool2d(1))


class Squeezed(nn.Module):
    """A block of EfficientNet: some channels count more, by a look at the whole image."""

    def __init__(self, width, out, stride=1, expand=3, act=nn.SiLU, scale_first=False):
        super().__init__()
        mid, few = width * expand, max(2, width // 2)
        self.expand = nn.Sequential(nn.Conv2d(width, mid, 1, bias=False), nn.BatchNorm2d(mid), act(inplace=True))
        self.spread = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.norm, self.act, self.gate = nn.BatchNorm2d(mid), act(inplace=True), nn.Sigmoid()
        self.reduce, self.widen = nn.Conv2d(mid, few, 1), nn.Conv2d(few, mid, 1)
        self.end = nn.Sequential(nn.Conv2d(mid, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual, self.scale_first = stride == 1 and width == out, scale_first

    def forward(self, x):
        out = self.act(self.norm(self.spread(self.expand(x))))
        if self.scale_first:
            scale = self.gate(self.widen(self.act(self.reduce(F.adaptive_avg_pool2d(out, 1)))))
            out = scale * out
        else:
            out = out * self.gate(self.widen(F.silu(self.reduce(out.mean((2, 3), keepdim=True)))))
        return x + self.end(out) if self.residual else self.end(out)


def efficient(act=nn.SiLU):
    """A small EfficientNet or, with Hardswish, something like MobileNetV3."""
    blocks = (Squeezed(8, 8, act=act), Squeezed(8, 12, 2, act=act, scale_first=True), Squeezed(12, 12, act=act))
    end = nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), act(inplace=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), act(), *blocks, *end)


def vgg():
    """A small VGG with BatchNorm, and a classifier of Linear layers."""

    class VGG(nn.Module):
        def __init__(self):
            super().__init__()
            layers, width = [], 3
            for item in (8, "M", 12, 12, "M"):
                if item == "M":
                    layers.append(nn.MaxPool2d(2))
                    continue
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                width = item
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 4))

        def forward(self, x):
            return self.classifier(self.features(x).flatten(1))

    return VGG()


class PreActivation(nn.Module):
    """Blocks of the second ResNet: norm and activation come first."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for i in (0, 2):
            out = self.convs[i](F.relu(self.norms[i](x)))
            x = x + self.convs[i + 1](F.relu(self.norms[i + 1](out)))
        return x


class Dense(nn.Module):
    """A block of DenseNet, which joins channels."""

    def __init__(self, width=6, depth=3):
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width * (i + 1)), nn.ReLU(), nn.Conv2d(width * (i + 1), 2 * width, 1),
                          nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1))
            for i in range(depth)
        )  # fmt: skip
        self.stem = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, x):
        features = [self.stem(x)]
        for pair in self.pairs:
            features.append(pair(torch.cat(features, 1)))
        return torch.cat(features, 1)


class UNet(nn.Module):
    """Down and up again, with a join."""

    def __init__(self):
        super().__init__()
        self.down, self.low, self.up = (self.twice(*widths) for widths in ((3, 8), (8, 12), (20, 8)))
        self.end = nn.Conv2d(8, 2, 1)

    @staticmethod
    def twice(width, out):
        return nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        high = self.down(x)
        low = F.interpolate(self.low(F.max_pool2d(high, 2)), scale_factor=2.0)
        return self.end(self.up(torch.cat([high, low], 1)))
