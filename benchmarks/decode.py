"""Decoding with a language model of the shape of a Llama of 1.1 billion weights (TinyLlama), pruned and accelerated.

    python benchmarks/decode.py [--sparsity 0.7 0.9] [--values bfloat16] [--head] [--layers 22] [--tokens 24]

Weights are random, and those of a checkpoint in bfloat16: rounded to it, held in float32. The Linear layers of the
blocks are pruned to one sparsity each; with --head so is the output layer. The embedding stays dense. Batch 1, a cache
of 64 tokens, one thread. Each sparsity runs in a process of its own, whose peak resident memory is told, with the given
model in it. Eager float32 and accelerated models decode in turn. The dense peer in bfloat16 (eager, oneDNN) has a
process of its own. The roof is the bytes of weights that a token takes over the speed of reading memory here. Times are
seconds of CPU of the one thread, so that other work on the machine counts less. How many layers run sparse is told by
the last part of their names; what stays dense is read in float32, also with --values (an output layer that is not
pruned: 262 MB a token).
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.runtime.products import bucket

PROMPT = 64  # tokens
TOGETHER = 4  # tokens that one side decodes before the other has its turn


class Decoder(nn.Module):
    """A language model whose cache is given as tensors, so that one example can be run again and again."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.cache_name = next(
            name for name in ("cache", "past_key_values") if name in inspect.signature(type(model).forward).parameters
        )

    def forward(self, ids: Tensor, *past: Tensor) -> Tensor:
        """Logits of the last token; past: keys and values of each layer."""
        return self.step(ids, self.cache(*past))

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        given = {"input_ids": ids, self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self.model(**given).logits
        return logits

    def cache(self, *past: Tensor) -> Any:
        from transformers import DynamicCache

        found = DynamicCache()
        for i, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            found.update(keys, values, i)
        return found


def llama(layers: int, dtype: torch.dtype) -> Decoder:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    normal = torch.nn.init.normal_
    torch.nn.init.normal_ = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
    try:  # or a minute goes by
        model = LlamaForCausalLM(config).to(dtype).eval()
    finally:
        torch.nn.init.normal_ = normal
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            for row in weight.split(1024):
                row.normal_(0, 0.02, generator=draw)
                row.copy_(row.bfloat16())
    return Decoder(model)


def past(layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 4, PROMPT, 64, dtype=dtype) for _ in range(2 * layers)]


def decoding(model: Decoder, layers: int) -> Callable[[], float]:
    """Greedy decoding behind a prompt; each call decodes some tokens more and gives seconds a token."""
    with torch.inference_mode():
        cache = model.cache(*past(layers, next(model.parameters()).dtype))
        token = model.step(torch.randint(0, 32000, (1, 1)), cache).argmax(-1)

    def some() -> float:
        nonlocal token
        start = time.process_time()
        with torch.inference_mode():
            for _ in range(TOGETHER):
                token = model.step(token, cache).argmax(-1)
        return (time.process_time() - start) / TOGETHER

    return some


def seconds(sides: dict[str, Callable[[], float]], tokens: int) -> dict[str, float]:
    """Median seconds a token, the sides in turn."""
    found = [{name: some() for name, some in sides.items()} for _ in range(max(3, tokens // TOGETHER))]
    return {name: median(one[name] for one in found) for name in sides}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def reading_speed() -> float:
    """Bytes a second of a sum over 256 MB."""
    numbers = torch.ones(64 << 20)

    def once() -> float:
        start = time.process_time()
        numbers.sum()
        return time.process_time() - start

    return numbers.nbytes / min(once() for _ in range(7))


def sparse_layers(plan: Any, rows: int) -> str:
    """How many layers of each name, and runs of layers of each class, are sparse for so many rows."""
    chosen: dict[str, list[bool]] = {}
    for layer in plan.layers:
        kind = f"runs in {layer.kind}" if layer.run else layer.name.rpartition(".")[2]
        chosen.setdefault(kind, []).append(bool(layer.choices >> bucket(rows) & 1))
    return ", ".join(f"{kind} {sum(found)} of {len(found)}" for kind, found in chosen.items())


def sparse(options: argparse.Namespace, sparsity: float) -> dict[str, Any]:
    roof = reading_speed()
    model = llama(options.layers, torch.float32)
    skip = ["model.model.embed_tokens"] + ([] if options.head else ["model.lm_head"])
    sc.prune(model, sparsity, scope=sc.weights(model, skip=skip), allocation="uniform")
    prompt = torch.randint(0, 32000, (1, PROMPT))
    examples = [(prompt[:, :1], *past(options.layers)), (prompt,)]
    before, start = peak_gb(), time.perf_counter()
    fast = sc.accelerate(
        model,
        examples,
        threads=1,
        values=getattr(torch, options.values),
        keep_dense=False,
        progress=True,
    )
    tuning = time.perf_counter() - start
    with torch.inference_mode():
        outs = [(fast(*one), model(*one)) for one in examples]
        error = max(float((got - exact).abs().max() / exact.abs().max()) for got, exact in outs)
    found = seconds({"eager": decoding(model, options.layers), "fast": decoding(fast, options.layers)}, options.tokens)
    plan = sc.explain(fast)
    released = sum(layer.released_bytes for layer in plan.layers)
    packed = sum(layer.packed_bytes for layer in plan.layers)
    dense = sum(4 * p.numel() for n, p in fast.named_parameters() if not p.is_meta and "embed" not in n)
    return {
        "sparsity": sparsity,
        "values": options.values,
        "head": "pruned" if options.head else "dense",
        "weights": sum(p.numel() for p in model.parameters()),
        "eager float32, tokens/s": 1 / found["eager"],
        "accelerated, tokens/s": 1 / found["fast"],
        "over eager float32": found["eager"] / found["fast"],
        "of the roof": (packed + dense) / roof / found["fast"],
        "reading, GB/s": roof / 1e9,
        "packed, GB": packed / 1e9,
        "released, GB": released / 1e9,
        "dense beside, GB": dense / 1e9,
        "sparse for one token": sparse_layers(plan, 1),
        f"sparse for {PROMPT} tokens": sparse_layers(plan, PROMPT),
        "prefill, over eager": plan.gains[1].speedup,
        "tuning, s": tuning,
        "peak before, GB": before,
        "peak in all, GB": peak_gb(),
        "error over largest logit": error,
    }


def peer(options: argparse.Namespace) -> dict[str, Any]:
    found = seconds({"bf16": decoding(llama(options.layers, torch.bfloat16), options.layers)}, options.tokens)
    return {"dense bfloat16, tokens/s": 1 / found["bf16"]}


def alone(job: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, _quiet) as pool:
        return pool.apply(job, given)


def _quiet() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--values", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--head", action="store_true", help="prune the output layer, too")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json")
    options = parser.parse_args()
    dense = alone(peer, options)
    rows = []
    for sparsity in options.sparsity:
        row = alone(sparse, options, sparsity) | dense
        row["over dense bfloat16"] = row["accelerated, tokens/s"] / row["dense bfloat16, tokens/s"]
        rows.append(row)
        for name, value in row.items():
            print(f"{name:>26}  {value if isinstance(value, str | int) else f'{value:.3g}'}", flush=True)
        print()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
