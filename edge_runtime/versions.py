"""What is installed, as the folders of the installed packages are named: nothing is imported."""

from __future__ import annotations

import contextlib
import platform
import sys
from pathlib import Path

__all__ = ["installed_versions"]

_DISTRIBUTIONS = ("fedzo", "numpy", "onnxruntime", "paho-mqtt")
_SUFFIX = ".dist-info"


def installed_versions(*more: str) -> dict[str, str]:
    """Versions of fedzo, of what decides its numbers, of ``more`` and of Python; ``missing`` for what is not there."""
    return {**{name: _version(name) for name in (*_DISTRIBUTIONS, *more)}, "python": platform.python_version()}


def _version(name: str) -> str:
    """Read from ``NAME-VERSION.dist-info``: ``importlib.metadata`` pulls in ``email`` and 1 MiB for the same answer."""
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in Path(folder).glob(f"*{_SUFFIX}"):
                package, _, version = entry.name.removesuffix(_SUFFIX).rpartition("-")
                if _normal(package) == _normal(name):
                    return version
    from importlib import metadata  # other ways to install, such as those of a Linux distribution

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _normal(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()
