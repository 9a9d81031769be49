"""What is known of this machine and of what is installed on it, without torch."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def secateur_version() -> str:
    """Return secateur's own version; "0+unknown" when it runs from a source tree that was not installed."""
    return version_of("secateur") or "0+unknown"


def cpu_name() -> str:
    """Return the name of the processor."""
    return first_of(cpuinfo(), "model name") or platform.processor() or platform.machine()


def cpuinfo(file: Path = Path("/proc/cpuinfo")) -> list[dict[str, str]]:
    """One dictionary a logical processor; none where the system has no such file."""
    if not file.exists():
        return []
    blocks = file.read_text(errors="replace").strip().split("\n\n")
    pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs]


def free_memory(file: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that programs may still take, swap included; None where the system does not say."""
    if not file.exists():
        return None
    fields = dict(line.split(":", 1) for line in file.read_text(errors="replace").splitlines() if ":" in line)
    found = [fields[name].split()[0] for name in ("MemAvailable", "SwapFree") if name in fields]
    return 1024 * sum(map(int, found)) if len(found) == 2 else None


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the bytes of the largest cache that the first processor sees; 32 MiB where the system does not say."""
    found = [file.read_text().strip() for file in sorted(folder.glob("index*/size"))]
    return max(
        (1024 * int(text[:-1]) for text in found if text[:-1].isdigit() and text.endswith("K")), default=32 << 20
    )


def first_of(cpu: list[dict[str, str]], key: str) -> str | None:
    """What the first processor that has this entry says, None if none has it."""
    return next((processor[key] for processor in cpu if key in processor), None)
