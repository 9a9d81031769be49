"""The peers of benchmarks/oneshot.py: each solves what it is given, on MiniLM, with the packages of its own folder.

    PYTHONPATH=FOLDER python benchmarks/oneshot_peers.py NAME REQUEST.json

A request names the Gram matrices of the layers (the same for all, padding left out), the levels, and a folder for the
weights that come out. Prints one line of JSON a level: CPU seconds of the solving alone. Each peer is called through
the function that computes its weights, so that nothing else of it is timed, with its own defaults:

- fmchisel: ALPS, and OSSCAR where a level is units to remove. Its package imports llm-compressor's, of which it needs
  one constant; that one file is imported without the package around it, which would need a dozen more.
- llmcompressor: SparseGPT. modelopt: SparseGPT, whose mask alone is kept. torchao: Wanda, which keeps norms itself.

`install` makes the folders: `pip install --no-deps`, on top of the torch and transformers that are there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oneshot_models import minilm

PACKAGES = {
    "fmchisel": ["fmchisel==0.1.2", "llmcompressor==0.5.2"],
    "llmcompressor": ["llmcompressor==0.5.2"],
    "torchao": ["torchao==0.9.0"],
    "modelopt": ["nvidia-modelopt==0.41.0", "pulp==2.9.0"],
}

Level = float | str | dict[str, float]  # a sparsity; "2:4"; or the shares of "ffn" and "heads" to remove
Weights = dict[str, Tensor]
Layers = dict[str, nn.Linear]
HEADS = 12


def install(folder: Path) -> None:
    """Make a folder for each peer, where it is not there yet."""
    for name, packages in PACKAGES.items():
        if not (folder / name).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / name)]
            subprocess.run([*pip, *packages], check=True)


def bare(name: str) -> Any:
    """Import a module, but run none of the packages that it stands in."""
    parents = name.split(".")[:-1]
    path: Any = None
    for i in range(1, len(parents) + 1):
        package = ".".join(parents[:i])
        spec = PathFinder.find_spec(package, path)
        if spec is None:
            raise ModuleNotFoundError(package)
        path = spec.submodule_search_locations
        if package not in sys.modules:
            sys.modules[package] = hollow = ModuleType(package)
            hollow.__path__ = list(path or [])
    return import_module(name)


# ---- peers: the weights that one layer gets ---------------------------------------------------------------------


def fmchisel(layers: Layers, grams: Weights, level: Level) -> Weights:
    if isinstance(level, dict):
        return osscar(layers, grams, level)
    solve = bare("fmchisel.pruning.alps.utils.alps_sparsify").sparsify_weight
    n, m, sparsity = (2, 4, 0.5) if level == "2:4" else (0, 0, level)
    return {
        name: solve(layer, {layer: grams[name].clone()}, sparsity, prunen=n, prunem=m)[1]
        for name, layer in layers.items()
    }


def osscar(layers: Layers, grams: Weights, level: dict[str, float]) -> Weights:
    """Zero columns of what reads the units, and the others refitted; as if what writes them were cut."""
    solve = bare("fmchisel.pruning.osscar.utils.osscar_sparsify").sparsify_weight
    found = {}
    for name, layer in layers.items():
        kind = "heads" if name.endswith("attention.output.dense") else "ffn" if name.endswith("output.dense") else ""
        if kind in level:
            units = HEADS if kind == "heads" else layer.in_features
            keep = units - round(level[kind] * units)
            found[name] = solve(layer, {layer: grams[name].clone()}, keep, 1, units)[1]
    return found


def llmcompressor(layers: Layers, grams: Weights, level: Level) -> Weights:
    solve = bare("llmcompressor.modifiers.obcq.sgpt_sparsify").sparsify_weight
    n, m, sparsity = (2, 4, 0.5) if level == "2:4" else (0, 0, level)
    return {
        name: solve(layer, {layer: grams[name].clone()}, sparsity, n, m, 128, 0.01, False)[1]
        for name, layer in layers.items()
    }


def modelopt(layers: Layers, grams: Weights, level: Level) -> Weights:
    from modelopt.torch.sparsity.weight_sparsity.sparsegpt import create_sgpt_mask

    config = {"pattern": "2:4 sparsity", "col_block_size": 128, "row_block_size": -1, "hessian_damp": 0.1}
    return {
        name: layer.weight * create_sgpt_mask(layer.weight, grams[name].clone(), config)
        for name, layer in layers.items()
    }


def torchao(layers: Layers, grams: Weights, level: Level) -> Weights:
    """Its observers add up what each layer reads: they are shown rows that have the norms of the true inputs."""
    wanda = bare("torchao.sparsity.wanda").WandaSparsifier
    found = {}
    for name, layer in layers.items():
        model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
        model[0].weight.data.copy_(layer.weight)
        sparsifier = wanda(semi_structured_block_size=4) if level == "2:4" else wanda(sparsity_level=level)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        model(grams[name].diagonal().sqrt().unsqueeze(0))
        sparsifier.step()
        sparsifier.squash_mask()
        found[name] = model[0].weight.detach()
    return found


PEERS: dict[str, Callable[[Layers, Weights, Level], Weights]] = {
    "fmchisel": fmchisel, "llmcompressor": llmcompressor, "torchao": torchao, "modelopt": modelopt,
}  # fmt: skip


# ---- both ends of a request -------------------------------------------------------------------------------------


def ask(name: str, folder: Path, levels: list[Level], grams: Weights, scratch: Path) -> Iterator[tuple[Level, Any]]:
    """Have a peer solve some levels in a process of its own: its weights and CPU seconds, for each level.

    Args:
        folder: where `install` put the peers.
        grams: by layer, [inputs, inputs] float32.
        scratch: a folder for what goes to and fro.
    """
    save_file({key: gram.contiguous() for key, gram in grams.items()}, scratch / "grams.safetensors")
    request = scratch / "request.json"
    request.write_text(json.dumps({"grams": str(scratch / "grams.safetensors"), "levels": levels, "out": str(scratch)}))
    command = [sys.executable, "-W", "ignore", __file__, name, str(request)]
    environment = os.environ | {"PYTHONPATH": str(folder / name), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{name} does not run here: {ran.stderr.strip().splitlines()[-1]}")
    for i, level in enumerate(levels):
        yield level, (load_file(scratch / f"{name}-{i}.safetensors"), json.loads(ran.stdout.splitlines()[i]))


def main() -> None:
    name, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    model, grams = minilm().requires_grad_(False), load_file(request["grams"])
    layers = {key: model.get_submodule(key) for key in grams}
    for i, level in enumerate(request["levels"]):
        start = time.process_time()
        with torch.no_grad():
            found = PEERS[name](layers, grams, level)
        seconds = time.process_time() - start
        save_file({key: w.contiguous() for key, w in found.items()}, Path(request["out"], f"{name}-{i}.safetensors"))
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
