"""What this machine and this installation are, and what makes models slow on them.

torch is imported only inside the functions that ask it, so that `secateur --version` is quick.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

from secateur.support.machine import cpu_name, cpuinfo, first_of, secateur_version, version_of
from secateur.support.tables import Printed, Table

_EXTRAS = {"metrics": "torchmetrics", "plot": "matplotlib"}
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
)


@dataclass(frozen=True)
class Facts:
    """What was found; `None` where the system does not tell."""

    secateur: str
    python: str
    torch: str
    numpy: str | None
    safetensors: str | None
    platform: str
    cpu: str
    cpu_flags: tuple[str, ...]
    """Of those that matter to kernels, the ones this CPU has."""
    torch_isa: str
    """The instruction set torch's own kernels use: DEFAULT, AVX2, AVX512, ..."""
    kernels: str | None
    """The instruction set the sparse kernels use: avx512, avx2, neon or portable; None without them."""
    generates: bool
    """Whether code that is made at run time can run: with avx512, where memory may be made executable."""
    physical_cores: int | None
    allowed_cores: int
    """Cores this process may use: affinity and container quota."""
    torch_threads: int
    mkl: bool
    onednn: bool
    denormals_flushed: bool
    debug_builds: tuple[str, ...]
    cuda_build: str | None
    devices: tuple[str, ...]
    extras: dict[str, str | None]
    """For each extra the version of what it brings, None if it is not installed."""


@dataclass(frozen=True)
class Finding:
    """Something slow or missing, why, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"- {self.what} -> {self.remedy}"


@dataclass(frozen=True)
class Diagnosis(Printed):
    """Facts and findings; prints as a table with the findings below."""

    facts: Facts
    findings: tuple[Finding, ...]

    def table(self) -> Table:
        """One row a fact; the findings are the notes."""
        rows = [(key.replace("_", " "), _text(value)) for key, value in asdict(self.facts).items()]
        return Table(("fact", "value"), rows, "secateur doctor", [str(finding) for finding in self.findings])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON: facts, findings."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Gather the facts about this machine and installation, and say what is slow and why; changes nothing.

    >>> found = diagnose()
    >>> found.facts.torch_threads >= 1, "dense kernels" in str(found)
    (True, True)
    """
    facts = _facts()
    return Diagnosis(facts, tuple(_findings(facts)))


def _facts() -> Facts:
    import torch

    from secateur.runtime import native

    backends: Any = torch.backends  # parts of it have no types
    cpu = cpuinfo()
    return Facts(
        secateur=secateur_version(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=version_of("numpy"),
        safetensors=version_of("safetensors"),
        platform=platform.platform(),
        cpu=cpu_name(),
        cpu_flags=tuple(f for f in _FLAGS if f in (first_of(cpu, "flags") or first_of(cpu, "Features") or "").split()),
        torch_isa=backends.cpu.get_cpu_capability(),
        kernels=native.isa(),
        generates=native.generates(),
        physical_cores=len({(c.get("physical id"), c["core id"]) for c in cpu if "core id" in c}) or None,
        allowed_cores=_allowed_cores(),
        torch_threads=torch.get_num_threads(),
        mkl=backends.mkl.is_available(),
        onednn=backends.mkldnn.is_available(),
        denormals_flushed=(torch.tensor([1e-39]) * 1.0).item() == 0.0,
        debug_builds=tuple(
            name
            for name, debug in (("torch", torch.version.debug), ("Python", hasattr(sys, "gettotalrefcount")))
            if debug
        ),
        cuda_build=torch.version.cuda,
        devices=_devices(),
        extras={extra: version_of(brings) if util.find_spec(brings) else None for extra, brings in _EXTRAS.items()},
    )


def _devices() -> tuple[str, ...]:
    import torch

    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in cuda]
    return ("cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else []))


def _allowed_cores() -> int:
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(affinity, _quota() or affinity)


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores the container may use (cgroup v2 or v1), rounded up; None when there is no limit."""
    v2, v1 = root / "cpu.max", root / "cpu"
    try:
        if v2.exists():
            quota, period = v2.read_text().split()
        else:
            quota, period = (v1 / "cpu.cfs_quota_us").read_text(), (v1 / "cpu.cfs_period_us").read_text()
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def _findings(facts: Facts) -> Iterator[Finding]:
    yield Finding(
        "dense kernels do not skip zeros: a pruned model is no faster by itself",
        "sc.accelerate(model, example_inputs), or remove whole units, and measure before you claim",
    )
    threads, cores = facts.torch_threads, facts.allowed_cores
    if threads > cores:
        yield Finding(
            f"torch uses {threads} threads on the {cores} cores it may use: the threads wait for each other",
            f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores} before Python starts",
        )
    if "avx2" in facts.cpu_flags and not facts.torch_isa.startswith("AVX"):
        yield Finding(
            f"this CPU has AVX2, and torch uses {facts.torch_isa}: its kernels run several times slower",
            "unset ATEN_CPU_CAPABILITY, or install the torch wheel of pytorch.org",
        )
    elif facts.torch_isa in ("DEFAULT", "NO AVX"):
        yield Finding("torch finds no vector instructions (AVX2 or the like): its kernels are slow", "use a newer CPU")
    if facts.kernels is None:
        yield Finding(
            "the native kernels are missing: sc.accelerate falls back to torch",
            "unset SECATEUR_LIBRARY and SECATEUR_NATIVE, and install secateur again where there is a C++17 compiler",
        )
    elif facts.kernels == "portable" and {"avx2", "avx512f", "asimd"}.intersection(facts.cpu_flags):
        yield Finding(
            "the native kernels use no vector instructions, and this CPU has them",
            "unset SECATEUR_ISA, or install secateur again with a newer compiler",
        )
    elif facts.kernels == "avx512" and not facts.generates:
        yield Finding(
            "this system lets no memory be made executable: sc.accelerate generates no code, and uses the kernels "
            "that were compiled",
            "allow it to this process (SELinux: execmem; systemd: MemoryDenyWriteExecute=no), if that is worth more "
            "speed to you",
        )
    if not (facts.mkl or facts.onednn):
        yield Finding(
            "torch was built without MKL and oneDNN: matrix products are slow",
            "install the torch wheel of pytorch.org",
        )
    for name in facts.debug_builds:
        yield Finding(f"{name} is a debug build: everything is slow", f"install a release build of {name}")
    if not facts.denormals_flushed:
        yield Finding(
            "denormal numbers (below 1.2e-38, as decaying weights become) are computed exactly: slow on many CPUs",
            "torch.set_flush_denormal(True)",
        )
    if facts.cuda_build and not any(device.startswith("cuda") for device in facts.devices):
        yield Finding(
            f"torch is built for CUDA {facts.cuda_build} and sees no device: everything runs on the CPU",
            "see what nvidia-smi says of driver and device, and CUDA_VISIBLE_DEVICES",
        )
    for extra in (name for name, version in facts.extras.items() if version is None):
        yield Finding(f"the extra '{extra}' is not installed", f'pip install "secateur[{extra}]"')


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
