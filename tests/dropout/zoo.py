"""Models with dropout in every place where people put it, and what a call must leave as it was; free of pytest."""

import random
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import zoo_beyond
import zoo_torch
from torch import nn
from zoo_parts import ZOO, Entry, Model, deprecated_jit, first, linear, scripted, sequences, vectors

import secateur as sc

__all__ = [
    "ZOO", "Entry", "Model", "answer", "bits", "deprecated_jit", "first", "fresh", "linear", "loop", "rest", "scripted",
    "sequences", "untouched", "vectors", "zoo_beyond", "zoo_torch",
]  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def bits(tensor):
    """A tensor as bytes: NaN equals itself, 0 is not -0."""
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).clone().numpy().tobytes()


def rest(model, inputs=()):
    """All of a model, of its inputs and of the process that a call must leave as it was; compare with ==."""
    modules = dict(model.named_modules())
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return {
        "state_dict": {name: bits(value) for name, value in model.state_dict().items()},
        "ids": {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())},
        "grad": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "plain": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
            for name, module in modules.items()
        },
        "hooks": {name: [list(getattr(module, kind, ())) for kind in HOOKS] for name, module in modules.items()},
        "flat weights": {
            name: [id(weight) for weight in module._flat_weights]
            for name, module in modules.items()
            if isinstance(module, nn.RNNBase)
        },
        "inputs": [bits(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        "random": (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
        "modes": (
            torch._C._len_torch_function_stack(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            sc.dropout.noise.SAMPLING.get(),
        ),
    }


@contextmanager
def untouched(entry):
    """A model of the zoo, its inputs and output; afterwards all must be as it was, and the model answer as before."""
    model, inputs, output = entry.build()
    torch.manual_seed(5)
    value = bits(answer(model, inputs, output))
    torch.manual_seed(5)
    before = rest(model, inputs)
    yield model, inputs, output
    after = rest(model, inputs)
    if entry.name == "noise in eval() too":  # of which each pass draws some
        del before["random"]
    for part, was in before.items():
        assert after[part] == was, part
    torch.manual_seed(5)
    assert bits(answer(model, inputs, output)) == value


def answer(model, inputs, output=None):
    """What a model gives; the inputs are copied first."""
    args, kwargs = fresh(inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors")  # of the fast path of TransformerEncoder
        found = model(*args, **kwargs)
    return found if output is None else output(found)


def fresh(inputs):
    """Positional and keyword arguments, copied."""
    inputs = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def loop(model, inputs, output, n, seed=0):
    """The plain way: n passes in `train()` with frozen normalisation; the model stays so."""
    plain = getattr(model, "_orig_mod", model)
    if "train" not in vars(plain):
        plain.train()
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    torch.manual_seed(seed)
    return torch.stack([answer(plain, inputs, output) for _ in range(n)])
