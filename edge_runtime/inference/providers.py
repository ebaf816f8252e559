"""Execution providers of ONNX Runtime: their names, and what each is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from ...protocol.errors import ConfigError

__all__ = ["CPU", "PROVIDER_OPTIONS", "provider_names"]

CPU: Final = "CPUExecutionProvider"
_SUFFIX: Final = "ExecutionProvider"
_KNOWN: Final = (
    *("CPU", "CUDA", "Tensorrt", "Xnnpack", "ACL", "ArmNN", "OpenVINO", "Dnnl", "ROCM", "MIGraphX", "Nnapi", "QNN"),
    *("VSINPU", "Rknpu", "CANN", "VitisAI", "CoreML", "Dml", "WebGpu", "Azure"),
)

PROVIDER_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        # TF32 keeps 10 bits of a float32's mantissa: known answers would be missed. The other default doubles the arena
        # at every growth. https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
        "CUDAExecutionProvider": {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
    }
)
"""Options of a provider that differ from ONNX Runtime's defaults."""


def provider_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names as people write them (``cuda,cpu``) as ONNX Runtime's, in the same order, each once.

    Args:
        names: Short or full names, in any case; an element may be a list with commas.

    Raises:
        ConfigError: There is no such provider, or no name at all.
    """
    by_name = {known.lower(): known + _SUFFIX for known in _KNOWN}
    found: dict[str, None] = {}
    for name in (part.strip() for text in names for part in text.split(",")):
        full = by_name.get(name.lower().removesuffix(_SUFFIX.lower()))
        if full is None:
            raise ConfigError(
                f"{name[:60]!r} is no execution provider of ONNX Runtime",
                hint=f"fedzo knows {', '.join(sorted(by_name))}; fedzo-device doctor says which are installed",
            )
        found[full] = None
    if not found:
        raise ConfigError("there is no execution provider", hint="the usual one is cpu")
    return tuple(found)
