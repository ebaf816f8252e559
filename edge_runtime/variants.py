"""Which variant of a graph this machine can run, and the weight tensors that it reads."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ArtifactError
from ..protocol.graph_files import GraphVariant
from ..protocol.layout import Layout
from ..protocol.manifest import Manifest
from ..protocol.mask import Mask
from ..protocol.placement import PLACEMENTS_KEY, decode_placements
from .artifact import Artifact
from .ort import runtime_version

__all__ = ["BlockedWeights", "block_size", "machine_family", "matching_variant", "usable_variant"]

_FAMILIES: Final = {"x86_64": "x86_64", "amd64": "x86_64"}
_CACHE_LINE: Final = 16  # entries


def machine_family() -> str:
    """Processor family as variants name it: ``x86_64``, or whatever the system says."""
    return _FAMILIES.get(platform.machine().lower(), platform.machine())


def block_size(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Channels in a block of ONNX Runtime's convolutions on this processor.

    Returns:
        16 with AVX-512F, 8 with AVX, 0 if there is neither or the system does not tell.
    """
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return 0
    return 16 if "avx512f" in flags else 8 if "avx" in flags else 0


def matching_variant(manifest: Manifest, graph: str) -> GraphVariant | None:
    """The variant of ``graph`` that was made for machines like this one and its release of ONNX Runtime."""
    candidates = [variant for variant in manifest.variants if variant.graph == graph]
    if not candidates:
        return None  # most boards: no need to look at the processor
    mine = (machine_family(), block_size(), runtime_version())
    return next((v for v in candidates if (v.machine, v.block, v.onnxruntime) == mine), None)


def usable_variant(artifact: Artifact, graph: str) -> GraphVariant | None:
    """:func:`matching_variant`, if its file is here and whole."""
    variant = matching_variant(artifact.manifest, graph)
    return variant if variant is not None and artifact.holds(variant.file) else None


class BlockedWeights:
    """Every weight tensor of a variant, in one buffer that the graph reads in place.

    Entries that the mask removed, and padding, are zeros for good; survivors are written straight to their places.

    Args:
        inputs: Inputs of the graph by name; those that are no parameters are left out.
        placements: Metadata of the graph, see :func:`~fedzo.protocol.placement.encode_placements`.
        layout: Of the artifact.
        mask: Which entries survive.

    Raises:
        ArtifactError: An input has not the size that its parameter needs, or a parameter has no input.

    Attributes:
        feeds: ``float32`` tensors by input name; views of the buffer, aligned to cache lines.
    """

    def __init__(self, inputs: Mapping[str, Sequence[int | str]], placements: str, layout: Layout, mask: Mask) -> None:
        rules = decode_placements(placements, layout)
        shapes, starts, total = [], [], 0
        for parameter in layout.parameters:
            shape = tuple(n for n in inputs.get(parameter.name, (0,)) if isinstance(n, int))
            rule = rules.get(parameter.name)
            if math.prod(shape) != (rule.size if rule else parameter.size):
                raise ArtifactError(
                    f"a variant of the graph has no input {parameter.name!r} of the size that it needs",
                    hint="the artifact was damaged or written by another program: export again",
                )
            shapes.append(shape)
            starts.append(total)
            total += -(-math.prod(shape) // _CACHE_LINE) * _CACHE_LINE
        buffer = np.zeros(total + _CACHE_LINE, np.float32)
        first = -(buffer.ctypes.data // 4) % _CACHE_LINE
        self._buffer = buffer[first:]
        self._places = np.empty(mask.n_survivors, np.intp)
        index, done = mask.index(), 0
        for parameter, start, count in zip(layout.parameters, starts, mask.counts().tolist(), strict=True):
            part = index[done : done + count]
            if parameter.name in rules:
                part = rules[parameter.name].positions(parameter.shape, part)
            np.add(part, start, out=self._places[done : done + count], casting="unsafe")
            done += count
        self.feeds: dict[str, NDArray[np.float32]] = {
            parameter.name: self._buffer[start : start + math.prod(shape)].reshape(shape)
            for parameter, start, shape in zip(layout.parameters, starts, shapes, strict=True)
        }

    @classmethod
    def of_session(cls, session: Any, layout: Layout, mask: Mask) -> BlockedWeights:
        """For a loaded variant.

        Raises:
            ArtifactError: See the class; or the graph says nothing about placements.
        """
        properties = session.get_modelmeta().custom_metadata_map
        shapes = {value.name: value.shape for value in session.get_inputs()}
        return cls(shapes, properties.get(PLACEMENTS_KEY, ""), layout, mask)

    def write(self, weights: NDArray[np.float32]) -> None:
        """Put ``weights float32[n_survivors]`` into the tensors."""
        self._buffer[self._places] = weights
