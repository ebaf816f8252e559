"""Which versions are installed, asked from package metadata: nothing of what is listed is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]

_DISTRIBUTIONS = ("fedzo", "onnxruntime", "numpy", "paho-mqtt", "torch", "onnx")


def installed_versions() -> dict[str, str | None]:
    """Version of fedzo, of what decides its numbers, and of Python; ``None`` for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["python"] = platform.python_version()
    return versions
