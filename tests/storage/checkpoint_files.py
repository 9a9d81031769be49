"""What the tests of pruned files share: checkpoints, what pruning in memory gives, and what lies in a folder."""

import hashlib
import json

import torch
from safetensors.torch import save_file
from torch import nn

import secateur as sc

INDEX = "model.safetensors.index.json"


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found, want):
    assert set(found) == set(want)
    for name in want:
        assert raw(found[name]) == raw(want[name]), name


def in_memory(tensors, sparsity, allocation="global", pattern=None, only="*", skip=()):
    """The same tensors, pruned as the parameters of a module, in their order; a tied one is one parameter."""
    model, names, places = nn.Module(), {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        names[name] = places.setdefault(id(tensor), f"t{i}")
        if names[name] == f"t{i}":
            keep = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            own = nn.Parameter(tensor.clone(), requires_grad=False) if keep else tensor.clone()
            (model.register_parameter if keep else model.register_buffer)(f"t{i}", own)
    scope = sc.weights(model, only=only, skip=skip)
    masks = sc.prune(model, sparsity, allocation=allocation, pattern=pattern, scope=scope)
    return {name: getattr(model, place).detach() for name, place in names.items()}, masks


def shards(folder, *parts, order=None, metadata=None):
    """A sharded folder; the index names the tensors in some order."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata=metadata or {"shard": str(i)})
        weight_map |= dict.fromkeys(part, file)
    weight_map = {name: weight_map[name] for name in order or weight_map}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def state_of(path):
    """Everything below a path: names, bytes, times."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in files}


def bytes_of(path):
    return {name: digest for name, (digest, _) in state_of(path).items()}


def names_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
