"""Real speech of a dozen people for benchmarks/oneshot.py, and the trained LSTM that tells them apart.

The recordings come in Debian packages of free software (telephone prompts, the letters and words that children's games
say), which `apt-get download` fetches once; nothing is installed. The weights are inside of resemblyzer 0.1.4, which is
not imported; soundfile reads Ogg; see requirements.txt.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from runtime_cases import inside

Wave = npt.NDArray[np.float32]

PACKAGES = (
    *(f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")),
    *("asterisk-prompt-it-menardi-wav", "ktuberling-data", "klettres-data"),
)
FOLDER = Path(tempfile.gettempdir()) / "secateur-speech"
RATE, WINDOW, STEP, BANDS, FRAMES = 16_000, 400, 160, 40, 160
SHORTEST = 110  # frames of voice in an utterance, at least: 1.1 s
FEWEST, MOST = 20, 80  # utterances of a speaker: a half to calibrate, a quarter to know him by, a quarter to test


class SpeakerEncoder(nn.Module):
    """Three LSTM layers of 256, and a Linear on the last state (the network of resemblyzer)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """Embed windows [n, frames, bands]: unit vectors [n, 256]."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


def speaker_encoder() -> SpeakerEncoder:
    """The trained network, in eval mode."""
    found = inside("resemblyzer", "pretrained.pt")
    if found is None:
        raise SystemExit("resemblyzer is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    state = torch.load(found, map_location="cpu", weights_only=True)
    model = SpeakerEncoder().eval()
    model.load_state_dict({key: value for key, value in state["model_state"].items() if not key.startswith("sim")})
    return model


@dataclass(frozen=True)
class Speech:
    """Windows of speech [n, 160 frames, 40 bands] and who speaks, [n].

    Attributes:
        calibration: windows without names, of other utterances than the others.
        enrolled, enrolled_names: what a speaker is known by.
        tested, tested_names: who is it?
    """

    calibration: Tensor
    enrolled: Tensor
    enrolled_names: Tensor
    tested: Tensor
    tested_names: Tensor

    @torch.no_grad()
    def judged(self, model: nn.Module) -> dict[str, float]:
        """ID: share of windows whose nearest speaker is theirs. EER: equal error rate over all pairs of windows."""
        enrolled, tested = model(self.enrolled), model(self.tested)
        names = self.enrolled_names.unique()
        known = torch.stack([enrolled[self.enrolled_names == name].mean(0) for name in names])
        nearest = names[(tested @ nn.functional.normalize(known, dim=1).T).argmax(1)]
        return {
            "ID": float((nearest == self.tested_names).float().mean()),
            "EER": _equal_error(tested @ tested.T, self.tested_names),
        }


def _equal_error(similar: Tensor, names: Tensor) -> float:
    pair = torch.ones_like(similar, dtype=torch.bool).triu(1)
    scores, same = similar[pair], (names[:, None] == names)[pair]
    same = same[scores.argsort(stable=True)].double()
    missed = same.cumsum(0) / same.sum()  # with a threshold above each score in turn
    taken = 1 - (1 - same).cumsum(0) / (1 - same).sum()
    at = int((missed - taken).abs().argmin())
    return float((missed[at] + taken[at]) / 2)


def speakers(draw: int = 0, unseen: bool = False, folder: Path = FOLDER) -> Speech:
    """Speech of all speakers, dealt out anew for each draw.

    Args:
        draw: which utterances go where.
        unseen: calibrate on one half of the speakers, and test on the other.
        folder: where the packages are unpacked.
    """
    generator = np.random.default_rng(draw)
    utterances = [windows[generator.permutation(len(windows))][:MOST] for windows in _windows(folder)]
    quarters = [windows.tensor_split(4) for windows in utterances]
    chosen = generator.permutation(len(quarters))
    calibrated, judged = (chosen[::2], chosen[1::2]) if unseen else (chosen, chosen)
    calibration = [torch.cat(quarters[i][:2]) for i in calibrated]
    enrolled = [quarters[i][2] for i in judged]
    asked = [quarters[i][3] for i in judged]
    shuffled = torch.cat(calibration)[torch.from_numpy(generator.permutation(sum(map(len, calibration))))]
    return Speech(shuffled, torch.cat(enrolled), _names(enrolled), torch.cat(asked), _names(asked))


def _names(parts: list[Tensor]) -> Tensor:
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _windows(folder: Path) -> list[Tensor]:
    """For each speaker the windows [n, frames, bands] of as many utterances as are wanted; read once."""
    store = folder / "windows.pt"
    if not store.exists():
        found = []
        for voice in _voices(folder):
            windows = [window for file in voice if (window := _window(file)) is not None]
            if len(windows) >= FEWEST:
                found.append(torch.stack(windows))
        torch.save(found, store)
    windows: list[Tensor] = torch.load(store, weights_only=True)
    return windows


def _voices(folder: Path) -> Iterator[list[Path]]:
    """The recordings of each speaker: a folder is one speaker's, as far as the packages say."""
    for package in PACKAGES:
        if not (folder / package).exists():
            (folder / "debs").mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=folder / "debs", check=True)
            (archive,) = (folder / "debs").glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        found: dict[str, list[Path]] = {}
        for file in sorted((folder / package).rglob("*")):
            if file.suffix in (".wav", ".ogg"):
                kind, *parts = file.relative_to(folder / package / "usr/share").parts
                found.setdefault(parts[0] if kind == "klettres" else parts[1], []).append(file)
        yield from (files for _, files in sorted(found.items()))


def _window(file: Path) -> Tensor | None:
    """The mel spectrogram of the first 1.6 seconds of voice, zeros behind a shorter one; None if it is too short."""
    from scipy.signal import resample_poly

    wave, rate = _read(file)
    if len(wave) < rate // 4:
        return None
    wave = _voice(resample_poly(wave, RATE, rate).astype(np.float32))
    if len(wave) < SHORTEST * STEP:
        return None
    mels = _mel_spectrogram(torch.from_numpy(wave))[:FRAMES]
    return nn.functional.pad(mels, (0, 0, 0, FRAMES - len(mels)))


def _read(file: Path) -> tuple[Wave, int]:
    import soundfile

    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return wave.mean(1), int(rate)


def _voice(wave: Wave) -> Wave:
    """Loud enough, and without silence: parts of 30 ms that are 35 dB below the loudest go."""
    part = RATE * 30 // 1000
    parts = wave[: len(wave) // part * part].reshape(-1, part)
    power = (parts**2).mean(1)
    voiced = parts[power > 10**-3.5 * power.max(initial=0)].reshape(-1)
    level = float(np.sqrt((voiced**2).mean())) if len(voiced) else 0.0
    return voiced * max(1.0, 10 ** (-30 / 20) / max(level, 1e-9)) if level else voiced[:0]


def _mel_spectrogram(wave: Tensor) -> Tensor:
    """Power in 40 mel bands [frames, bands], as librosa's `melspectrogram` gives it and the network was trained on."""
    spectrum = torch.stft(
        wave, WINDOW, STEP, window=torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    return (_bands() @ spectrum.abs().square()).T.contiguous()


def _bands() -> Tensor:
    """Triangles of equal area on the mel scale of Slaney 1998, "Auditory Toolbox": [bands, frequencies]."""
    low, high = 200 / 3, 1000.0  # linear below `high` hertz, logarithmic above
    log_step = np.log(6.4) / 27

    def mel(hertz: float) -> float:
        return hertz / low if hertz < high else high / low + np.log(hertz / high) / log_step

    points = np.linspace(0, mel(RATE / 2), BANDS + 2)
    edges: Any = np.where(points < high / low, points * low, high * np.exp(log_step * (points - high / low)))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(triangles.astype(np.float32))
