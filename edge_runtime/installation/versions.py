"""What is installed, as the folders of the installed packages are named: nothing is imported."""

from __future__ import annotations

import contextlib
import platform
import sys
from pathlib import Path

__all__ = ["installed_versions"]

_DISTRIBUTIONS = ("fedzo", "numpy", "onnxruntime", "paho-mqtt")
_OTHER_BUILDS = {"onnxruntime": ("onnxruntime-gpu",)}  # the same release, with more providers (Jetson)
_SUFFIX = ".dist-info"


def installed_versions(*more: str) -> dict[str, str]:
    """Versions of fedzo, of what decides its numbers, of ``more`` and of Python; ``missing`` for what is not there."""
    return {**{name: _version(name) for name in (*_DISTRIBUTIONS, *more)}, "python": platform.python_version()}


def _version(name: str) -> str:
    """Read from ``NAME-VERSION.dist-info``: ``importlib.metadata`` pulls in ``email`` and 1 MiB for the same answer."""
    names = (name, *_OTHER_BUILDS.get(name, ()))
    found: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in Path(folder).glob(f"*{_SUFFIX}"):
                package, _, version = entry.name.removesuffix(_SUFFIX).rpartition("-")
                found.setdefault(_normal(package), version)
    for build in names:
        if _normal(build) in found:
            return found[_normal(build)]
    from importlib import metadata  # other ways to install, such as those of a Linux distribution

    for build in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(build)
    return "missing"


def _normal(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()
