"""A small CNN and a metric, for tests of trials: in a module, so that they can go to other processes."""

import torch
from torch import nn

from secateur.demo import digits


def cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6 * 36, 10)).eval()


def images(count=64):
    data = digits.load()
    return data.test_images[:count].unsqueeze(1), data.test_labels[:count]


@torch.no_grad()
def agreement(model):
    """Minus how far the outputs are from those of fixed weights: 0 for `cnn()` as it is."""
    x, _ = images(16)
    return -(model(x) - cnn()(x)).norm()


def noisy(model):
    """`agreement`, with a number drawn by torch's own generator."""
    return agreement(model) + torch.rand(())


def trained_lstm():
    """An LSTM after two epochs on the digits, and its accuracy as a metric; to be called within `digits.alone`."""
    data = digits.load()
    model = digits.LSTMClassifier(64)
    digits.train(model, digits.adam(model), data, 2)
    return model, lambda model: digits.accuracy(model, data)


def everything(model):
    """All bits of a model, and all else that a trial might change."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bits = [(name, t.detach().reshape(-1).contiguous().view(torch.uint8).tolist(), t.dtype) for name, t in tensors]
    places = [(name, id(t), t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()]
    return bits, places, [m.training for m in model.modules()]
