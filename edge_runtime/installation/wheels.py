"""Releases of ONNX Runtime that are known not to work on some processors, and what this processor is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["KNOWN_BAD", "BadRelease", "Processor", "known_bad", "this_processor"]

_CORES: Final = {
    "0xc07": "Cortex-A7",
    "0xc08": "Cortex-A8",
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0b": "Cortex-A76",
    "0xd42": "Cortex-A78AE",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """What ``/proc/cpuinfo`` and the device tree say.

    Attributes:
        machine: As ``uname -m`` prints it.
        features: Flags of the first core.
        core: Its name, ``part 0x...`` if unknown, empty where the system does not tell.
        board: Model of the board; empty where there is no device tree.
    """

    machine: str
    features: frozenset[str] = frozenset()
    core: str = ""
    board: str = ""

    @property
    def armv8_0(self) -> bool:
        """A 64-bit Arm core without the atomics of Armv8.1: Cortex-A35, A53, A57, A72, A73."""
        return self.machine == "aarch64" and bool(self.features) and "atomics" not in self.features


@dataclass(frozen=True, slots=True)
class BadRelease:
    """One release and where it fails.

    Attributes:
        version: Of onnxruntime.
        what: What happens.
        issue: Where it was reported.
        certain: It fails on this kind of processor whatever the model; else it may.
        applies: Whether it concerns a processor.
    """

    version: str
    what: str
    issue: str
    certain: bool
    applies: Callable[[Processor], bool]


KNOWN_BAD: Final = (
    BadRelease(
        "1.21.0",
        "dies with an illegal instruction when imported on Armv8.0 cores such as Cortex-A53 and A72",
        "https://github.com/microsoft/onnxruntime/issues/23957",
        True,
        lambda processor: processor.armv8_0,
    ),
    BadRelease(
        "1.22.0",
        "was seen to abort with some models on a Raspberry Pi Zero 2 W",
        "https://github.com/microsoft/onnxruntime/issues/25472",
        False,
        lambda processor: processor.armv8_0,
    ),
    BadRelease(
        "1.27.0",
        "computes wrong convolutions, silently, on Arm processors with SME",
        "https://github.com/k2-fsa/sherpa-onnx/pull/3850",
        True,
        lambda processor: "sme" in processor.features,
    ),
)


def known_bad(version: str, processor: Processor) -> BadRelease | None:
    """The entry of :data:`KNOWN_BAD` that concerns this release on this processor."""
    full = version if version.count(".") != 1 else f"{version}.0"  # Debian's 1.21.0 calls itself 1.21
    return next((bad for bad in KNOWN_BAD if bad.version == full and bad.applies(processor)), None)


def this_processor(
    cpuinfo: Path = Path("/proc/cpuinfo"), model: Path = Path("/proc/device-tree/model"), machine: str = ""
) -> Processor:
    """The machine that this process runs on; where the system does not tell, fields stay empty."""
    features: frozenset[str] = frozenset()
    core = ""
    for name, value in _lines(cpuinfo):
        if name in ("Features", "flags") and not features:
            features = frozenset(value.split())
        elif name == "CPU part" and not core:
            core = _CORES.get(value, f"part {value}")
        elif name == "model name" and not core:
            core = value
    board = next(iter(_text(model).split("\0")), "").strip()
    return Processor(machine or platform.machine(), features, core, board)


def _lines(path: Path) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in _text(path).splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
