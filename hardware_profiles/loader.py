"""Loads and checks hardware profiles.

A profile is a TOML file named after the board. Its table ``[sources]`` says for each value where it comes from:

* ``vendor``: data sheet or product page; ``device-tree``: the Linux source;
* ``sbc-bench``: a published run of github.com/ThomasKaiser/sbc-bench on the board;
* ``derived``: computed from other values; ``user``: set by hand;
* ``unverified``: believed, but nobody checked.

Text after a colon adds detail, as in ``"sbc-bench: a board with the same SoC"``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FIELDS", "SOURCES", "Profile", "list_profiles", "load_profile", "profile_names"]

SOURCES: Final = ("vendor", "device-tree", "sbc-bench", "derived", "user", "unverified")
_BUILT_IN: Final = Path(__file__).resolve().parent
_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MAX_BYTES: Final = 64 << 10
_MACHINES: Final = ("aarch64", "armv7l", "x86_64")


@dataclass(frozen=True, slots=True)
class Profile:
    """A board.

    Attributes:
        name: As on the command line, such as ``rpi-zero-2w``.
        title: As people write it.
        soc: System on chip.
        cpu_part: Cores by type, such as ``4x Cortex-A53``.
        cores: Number of cores.
        clock_mhz: Highest sustained clock of the fastest cores.
        machine: ``aarch64``, ``armv7l`` or ``x86_64``; what ``uname -m`` prints.
        isa: Instruction set and extensions.
        ram_total_mib: ``MemTotal`` as Linux shows it, which is less than the label says.
        reserve_mib: What the idle system needs of it.
        ram_budget_mib: What fedzo may use, at most ``ram_total_mib - reserve_mib``.
        page_size: Of the usual kernel, in bytes.
        threads: Threads for the forward passes.
        memcpy_mb_s: Copy bandwidth of one core, MB/s; ``None`` if unknown.
        memset_mb_s: Fill bandwidth of one core, MB/s; ``None`` if unknown.
        macs_per_cycle: ``float32`` multiply-accumulates that one of the used cores can do in a cycle; ``None`` if
            unknown.
        system: Recommended operating system.
        python: Its Python.
        install: How to install fedzo there, when plain pip is not enough.
        notes: What else to know.
        sources: Where each value comes from, by field.
        origin: The file.
    """

    name: str
    title: str
    soc: str
    cpu_part: str
    cores: int
    clock_mhz: int
    machine: str
    isa: tuple[str, ...]
    ram_total_mib: int
    reserve_mib: int
    ram_budget_mib: int
    page_size: int
    threads: int
    memcpy_mb_s: int | None = None
    memset_mb_s: int | None = None
    macs_per_cycle: int | None = None
    system: str = ""
    python: str = ""
    install: str = ""
    notes: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def source(self, name: str) -> str:
        """Where the value of field ``name`` comes from: the text in the file, or ``unverified``."""
        return self.sources.get(name, "unverified")

    @property
    def unverified(self) -> tuple[str, ...]:
        """Fields with a value that nobody checked."""
        return tuple(n for n in _SOURCED if getattr(self, n) is not None and self.source(n).startswith("unverified"))


FIELDS: Final = tuple(f.name for f in dataclasses.fields(Profile) if f.name != "origin")
_REQUIRED: Final = tuple(
    f.name
    for f in dataclasses.fields(Profile)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
)
_SOURCED: Final = (
    "soc",
    "cpu_part",
    "cores",
    "clock_mhz",
    "macs_per_cycle",
    "isa",
    "ram_total_mib",
    "reserve_mib",
    "ram_budget_mib",
    "page_size",
    "threads",
    "memcpy_mb_s",
    "memset_mb_s",
)
_RANGES: Final = {
    "cores": (1, 1024),
    "clock_mhz": (1, 20_000),
    "macs_per_cycle": (1, 1024),
    "ram_total_mib": (32, 1 << 24),
    "reserve_mib": (0, 1 << 24),
    "ram_budget_mib": (1, 1 << 24),
    "page_size": (4096, 65536),
    "threads": (1, 1024),
    "memcpy_mb_s": (1, 10_000_000),
    "memset_mb_s": (1, 10_000_000),
}


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Load one profile.

    A name is looked up in the folders of ``$FEDZO_PROFILES`` (separated as in ``$PATH``), in
    ``~/.config/fedzo/profiles``, then among the built-in ones. Anything with a slash or ending in ``.toml`` is a path.

    Raises:
        ConfigError: There is no such profile (the message suggests close names), or a value in it is wrong.
    """
    text = os.fspath(name_or_path)
    if os.sep in text or "/" in text or text.endswith(".toml"):
        return _load(Path(text).expanduser())
    files = _files()
    if text in files:
        return _load(files[text])
    close = difflib.get_close_matches(text.lower(), files, n=3, cutoff=0.5)
    raise ConfigError(
        f"there is no hardware profile {text!r}",
        hint=f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(files))}",
    )


def profile_names() -> list[str]:
    """Names of all profiles that :func:`load_profile` finds, sorted."""
    return sorted(_files())


def list_profiles() -> list[Profile]:
    """All profiles by name.

    Raises:
        ConfigError: A file of the user's is wrong; the message names it.
    """
    return [_load(path) for _, path in sorted(_files().items())]


def _files() -> dict[str, Path]:
    """File by name; a folder of the user's hides a built-in profile of the same name."""
    folders = [_BUILT_IN]
    with contextlib.suppress(RuntimeError):  # a service may run as a user without a home
        folders.append(Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "fedzo" / "profiles")
    listed = [Path(part).expanduser() for part in os.environ.get("FEDZO_PROFILES", "").split(os.pathsep) if part]
    folders.extend(reversed(listed))
    files: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            files.update({path.stem: path for path in folder.iterdir() if path.suffix == ".toml"})
    return files


def _load(path: Path) -> Profile:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no profile file {path}", hint=f"built in: {', '.join(profile_names())}") from None
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"the profile {path} is longer than {_MAX_BYTES} bytes")
    try:
        raw = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profile {path} is no TOML: {error}") from None
    return _checked(raw, path)


def _checked(raw: Mapping[str, Any], path: Path) -> Profile:
    for key in raw:
        if key not in FIELDS:
            close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(FIELDS)}"
            raise ConfigError(f"{path}: there is no field {key!r}", hint=hint)
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} missing", hint="copy a built-in profile and change it")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Profile):
        if item.name not in raw:
            continue
        value = raw[item.name]
        if item.name == "isa":
            values["isa"] = _texts(value, path)
        elif item.name == "sources":
            values["sources"] = _sources(value, path)
        elif item.name in _RANGES:
            values[item.name] = _integer(item.name, value, path)
        elif isinstance(value, str) and len(value) <= 2000:
            values[item.name] = value
        else:
            raise ConfigError(f"{path}: {item.name} must be a text, not {value!r}")
    return _consistent(Profile(**values, origin=str(path)), path)


def _consistent(profile: Profile, path: Path) -> Profile:
    if not _NAME.fullmatch(profile.name) or profile.name != path.stem:
        raise ConfigError(
            f"{path}: name is {profile.name!r}, it must be that of the file, in lower case with hyphens",
            hint=f"set name = {path.stem!r} or rename the file",
        )
    if profile.machine not in _MACHINES:
        raise ConfigError(f"{path}: machine is {profile.machine!r}, it must be {', '.join(_MACHINES)}")
    free = profile.ram_total_mib - profile.reserve_mib
    if profile.ram_budget_mib > free:
        raise ConfigError(
            f"{path}: ram_budget_mib is {profile.ram_budget_mib}, but ram_total_mib {profile.ram_total_mib} less"
            f" reserve_mib {profile.reserve_mib} leaves {free}",
            hint=f"set ram_budget_mib to {max(1, free // 2)} or less",
        )
    if profile.page_size & (profile.page_size - 1):
        raise ConfigError(f"{path}: page_size is {profile.page_size}, it must be a power of two")
    if profile.threads > profile.cores:
        raise ConfigError(f"{path}: threads is {profile.threads}, the board has {profile.cores} cores")
    return profile


def _integer(name: str, value: object, path: Path) -> int:
    low, high = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{path}: {name} is {value!r}, it must be a whole number from {low} to {high}")
    return value


def _texts(value: object, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{path}: isa must be a list of texts, not {value!r}", hint='isa = ["armv8.0-a", "neon"]')
    return tuple(value)


def _sources(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: sources must be a table", hint="write [sources] and one line a field")
    for key, text in value.items():
        if key not in _SOURCED:
            close = difflib.get_close_matches(key, _SOURCED, n=1, cutoff=0.5)
            raise ConfigError(
                f"{path}: [sources] names the field {key!r}", hint=f"did you mean {close[0]}?" if close else ""
            )
        if not isinstance(text, str) or text.partition(":")[0] not in SOURCES:
            raise ConfigError(
                f"{path}: the source of {key} is {text!r}",
                hint=f"begin with {', '.join(SOURCES)}, and add detail after a colon",
            )
    return dict(value)
