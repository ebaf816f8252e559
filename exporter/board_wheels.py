"""The wheels that a board of another kind needs, fetched by pip on this machine.

pip takes tags of a foreign platform, but judges the environment markers of dependencies (``python_version < "3.11"``)
by the interpreter that runs it. So what pip fetched is walked with the board's own markers, what is missing or of a
version that does not fit is fetched by name, and what the board does not need is dropped.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from ..protocol.errors import ConfigError

__all__ = ["PLATFORMS", "SYSTEM_PACKAGES", "Board", "fetch_wheels"]

PLATFORMS: Final = {"aarch64": "aarch64", "arm64": "aarch64", "armhf": "armv7l", "armv7l": "armv7l",
                    "x86_64": "x86_64", "amd64": "x86_64"}  # fmt: skip
"""Names that people use, and what ``uname -m`` says on such a board."""
SYSTEM_PACKAGES: Final = frozenset({"numpy", "onnxruntime"})
"""What a distribution may bring instead of wheels."""

_TIMEOUT_S: Final = 1_200
_ROUNDS: Final = 8
_OLDEST_MANYLINUX: Final = 17
_NO_NETWORK: Final = re.compile(
    r"NewConnectionError|Failed to establish a new connection|Temporary failure in name resolution|ConnectTimeoutError"
    r"|Could not fetch URL|ProxyError|Network is unreachable"
)
_NO_WHEEL: Final = re.compile(r"No matching distribution found for (\S+)")


@dataclass(frozen=True, slots=True)
class Board:
    """What decides which wheels run there.

    Attributes:
        machine: As ``uname -m`` says.
        python: ``3.11``.
        glibc: Its C library's minor version, the 28 of 2.28; a board with a newer one runs the same wheels.
    """

    machine: str
    python: str
    glibc: int = 28

    def __post_init__(self) -> None:
        if self.machine not in PLATFORMS.values():
            raise ConfigError(
                f"{self.machine[:40]!r} is no platform that fedzo knows", hint=f"it is one of {', '.join(PLATFORMS)}"
            )
        match = re.fullmatch(r"3\.(\d{1,2})", self.python)
        if match is None or int(match[1]) < 10:
            raise ConfigError(f"Python {self.python[:20]!r} is not 3.10 or newer", hint="such as --python 3.11")
        if not _OLDEST_MANYLINUX <= self.glibc <= 99:
            raise ConfigError(f"glibc 2.{self.glibc} is not between 2.{_OLDEST_MANYLINUX} and 2.99")

    @property
    def options(self) -> list[str]:
        """pip's options for this board."""
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc, _OLDEST_MANYLINUX - 1, -1)]
        tags += [f"manylinux2014_{self.machine}", f"linux_{self.machine}"]
        chosen = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        return chosen + [option for tag in tags for option in ("--platform", tag)]

    @property
    def markers(self) -> dict[str, str]:
        """The environment of PEP 508 there."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
            "extra": "",
        }


def fetch_wheels(board: Board, wheel: Path, folder: Path, *, without: Iterable[str] = ()) -> list[Path]:
    """Fetch what a wheel needs on a board, to any depth, and pip itself.

    Args:
        board: Where it is to run.
        wheel: The wheel that is to run there, already in ``folder``.
        folder: Holds that wheel alone, and all of them afterwards.
        without: Distributions that the board has otherwise; what only they need is left out as well.

    Returns:
        The wheels in ``folder``, in alphabetical order.

    Raises:
        ConfigError: pip is not there or cannot reach its index, or there is no such wheel for that board.
    """
    left_out: set[str] = {canonicalize_name(name) for name in without}
    own = _name(wheel)
    limits = _needed(board, [wheel], own, left_out)
    for _ in range(_ROUNDS):
        _download(board, ["pip", *(f"{name}{limit}" for name, limit in limits.items() if name != own)], folder)
        found = sorted(folder.glob("*.whl"))
        limits = _needed(board, found, own, left_out)
        if limits.keys() <= {_name(path) for path in found} and all(_fits(path, limits) for path in found):
            return _kept(found, {"pip", *limits})
        for path in found:  # all of them, or another version may join one that is there
            if path.name != wheel.name:
                path.unlink()
    raise ConfigError(
        f"pip does not fetch {', '.join(f'{name}{limit}' for name, limit in limits.items())} together",
        hint="give another wheel of fedzo with --wheel, or another --python",
    )


def _fits(wheel: Path, limits: dict[str, SpecifierSet]) -> bool:
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return name not in limits or limits[name].contains(version, prereleases=True)


def _kept(found: list[Path], needed: set[str]) -> list[Path]:
    """What is left when everything that the board does not need is deleted."""
    for path in found:
        if _name(path) not in needed:
            path.unlink()
    return [path for path in found if _name(path) in needed]


def _download(board: Board, requirements: Iterable[str], folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--progress-bar=off",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += [*board.options, "--dest", str(folder), *requirements]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"pip took more than {_TIMEOUT_S} s", hint="look at the network, and try again") from None
    if done.returncode:
        raise _failure(board, done.stderr)


def _failure(board: Board, text: str) -> ConfigError:
    """What pip's complaint means."""
    if "No module named pip" in text:
        return ConfigError("this Python has no pip", hint="python -m ensurepip, or apt install python3-pip")
    match = _NO_WHEEL.search(text)
    # pip's own wheel runs everywhere: an index without it is none.
    if _NO_NETWORK.search(text) or (match is not None and match[1] == "pip"):
        return ConfigError(
            "pip cannot reach the package index", hint="a bundle is made where there is a network, and used where not"
        )
    if match is not None:
        where = f"Python {board.python} on {board.machine} with glibc 2.{board.glibc}"
        if board.machine == "armv7l":
            hint = "32-bit Arm takes numpy and onnxruntime from Debian 13; add --system-packages"
        else:
            hint = "try another --python, or the board's own --glibc"
        return ConfigError(f"there is no wheel of {match[1]} for {where}", hint=hint)
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.strip().splitlines() or ["no text"]
    return ConfigError(f"pip failed: {lines[-1][:300]}")


def _name(wheel: Path) -> str:
    return str(parse_wheel_filename(wheel.name)[0])


def _requirements(wheel: Path, board: Board) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        headers = email.parser.Parser().parsestr(archive.read(member).decode("utf-8"), headersonly=True)
    lines = [Requirement(line) for line in headers.get_all("Requires-Dist") or []]
    return [line for line in lines if line.marker is None or line.marker.evaluate(board.markers)]


def _needed(board: Board, wheels: Iterable[Path], start: str, left_out: set[str]) -> dict[str, SpecifierSet]:
    """What a distribution needs there, to any depth as far as the wheels tell, and the versions asked for."""
    by_name = {_name(wheel): wheel for wheel in wheels}
    limits: dict[str, SpecifierSet] = {start: SpecifierSet()}
    waiting = [start]
    while waiting:
        wheel = by_name.get(waiting.pop())
        for line in () if wheel is None else _requirements(wheel, board):
            name = canonicalize_name(line.name)
            if name not in left_out:
                if name not in limits:
                    waiting.append(name)
                limits[name] = limits.get(name, SpecifierSet()) & line.specifier
    return limits
