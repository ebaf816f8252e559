"""The wheel of the fedzo that runs, made from its installed files: no build tool, no network, no checkout."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..protocol.errors import ConfigError

__all__ = ["write_own_wheel"]

_PACKAGES = Path(__file__).resolve().parent.parent  # site-packages/fedzo, or the checkout of an editable installation
_SUFFIXES = (".py", ".toml", ".typed")
_TIME = (1980, 1, 1, 0, 0, 0)  # the first one that a zip file can say: the same files give the same bytes


def write_own_wheel(folder: Path) -> Path:
    """Write ``fedzo-VERSION-py3-none-any.whl``, PEP 427.

    Args:
        folder: Where to write it.

    Raises:
        ConfigError: It cannot be written, or fedzo was copied here without its metadata.
    """
    try:
        distribution = importlib.metadata.distribution("fedzo")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "fedzo is not installed here, so there is no metadata for a wheel", hint="give one with --wheel"
        ) from None
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    info = f"fedzo-{distribution.version}.dist-info"
    scripts = [f"{e.name} = {e.value}" for e in distribution.entry_points if e.group == "console_scripts"]
    files = {
        **dict(_sources()),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: fedzo\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": ("[console_scripts]\n" + "\n".join(sorted(scripts)) + "\n").encode(),
    }
    record = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = ("".join(record) + f"{info}/RECORD,,\n").encode()
    path = folder / f"fedzo-{distribution.version}-py3-none-any.whl"
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                wheel.writestr(entry, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _sources() -> Iterator[tuple[str, bytes]]:
    for init in sorted(_PACKAGES.glob("*/__init__.py")):
        if init.parent.name == "tests":
            continue
        for path in sorted(init.parent.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                yield f"fedzo/{path.relative_to(_PACKAGES).as_posix()}", path.read_bytes()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
