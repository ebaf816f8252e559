"""What is installed, asked from package metadata: nothing of it is imported."""

from __future__ import annotations

import importlib.metadata
import platform

__all__ = ["installed_versions"]

_DISTRIBUTIONS = ("fedzo", "numpy", "onnxruntime", "paho-mqtt")


def installed_versions(*more: str) -> dict[str, str]:
    """Versions of fedzo, of what decides its numbers, of ``more`` and of Python; ``missing`` for what is not there."""
    versions = {}
    for name in (*_DISTRIBUTIONS, *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {**versions, "python": platform.python_version()}
