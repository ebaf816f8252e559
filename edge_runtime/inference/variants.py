"""Which variants of a graph this machine can run, and the weight tensors that they read."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.artifact.layout import Layout
from ...protocol.artifact.manifest import Manifest
from ...protocol.artifact.placement import PLACEMENTS_KEY, decode_placements
from ...protocol.artifact.query_layout import query_layout, query_name
from ...protocol.errors import ArtifactError
from ...protocol.perturbation.buffers import CACHE_LINE, aligned_zeros
from ...protocol.pruning.mask import Mask
from .long_runs import Scatter
from .ort import runtime_version

__all__ = [
    "BlockedWeights",
    "block_size",
    "machine_family",
    "matching_variant",
    "wanted_variants",
]

_PIECE: Final = 1 << 16
_FAMILIES: Final = {"x86_64": "x86_64", "amd64": "x86_64"}


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


def wanted_variants(manifest: Manifest, *, portable: bool = False) -> tuple[GraphVariant, ...]:
    """What a device like this one may run in place of ``probe.onnx``, the best first.

    Args:
        manifest: Of the artifact.
        portable: Leave out what is made for a kind of machine.

    Returns:
        The variant for this machine, if there is one, and the one for several queries in a run: for this machine, or
        else for any.
    """
    if not manifest.variants:
        return ()  # most boards: no need to look at the processor
    mine = None if portable else (machine_family(), block_size(), runtime_version())
    own = [v for v in manifest.variants if (v.machine, v.block, v.onnxruntime) == mine]
    single = [v for v in own if v.queries == 1]
    batched = [v for v in own if v.queries > 1] or [v for v in manifest.variants if v.machine == "any"]
    return (*single[:1], *batched[:1])


def matching_variant(manifest: Manifest, graph: str) -> GraphVariant | None:
    """The variant of ``graph`` that was made for machines like this one, for one query a run."""
    return next((v for v in wanted_variants(manifest) if (v.graph, v.queries) == (graph, 1)), None)


class BlockedWeights:
    """Every weight tensor of a variant, in one buffer that the graph reads in place.

    Entries that the mask removed are what they are for good, padding is 0; survivors are written straight to their
    places.

    Args:
        inputs: Inputs of the graph by name; those that are no parameters are left out.
        placements: Metadata of the graph, see :func:`~fedzo.protocol.artifact.placement.encode_placements`.
        layout: Of the artifact.
        mask: Which entries survive.
        queries: Sets of weights, see :mod:`fedzo.protocol.artifact.query_layout`.
        filled: ``float32[layout.size]``, what removed entries are; None for zeros.

    Raises:
        ArtifactError: An input has not the size that its parameter needs, or a parameter has no input.

    Attributes:
        feeds: ``float32`` tensors by input name; views of the buffer, aligned to cache lines.
    """

    def __init__(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        placements: str,
        layout: Layout,
        mask: Mask,
        queries: int = 1,
        filled: NDArray[np.float32] | None = None,
    ) -> None:
        joint = {p.name for p in layout.parameters if queries > 1 and p.name in inputs}
        tensors = query_layout(layout, queries, joint)
        rules = decode_placements(placements, tensors)
        shapes, starts, total = {}, {}, 0
        for tensor in tensors.parameters:
            shape = tuple(n for n in inputs.get(tensor.name, (0,)) if isinstance(n, int))
            rule = rules.get(tensor.name)
            if math.prod(shape) != (rule.size if rule else tensor.size):
                raise ArtifactError(
                    f"a variant of the graph has no input {tensor.name!r} of the size that it needs",
                    hint="the artifact was damaged or written by another program: export again",
                )
            shapes[tensor.name], starts[tensor.name] = shape, total
            total += -(-math.prod(shape) * 4 // CACHE_LINE) * CACHE_LINE // 4
        self._buffer = aligned_zeros(total)
        sizes = {tensor.name: tensor.shape for tensor in tensors.parameters}

        def places(mask: Mask) -> NDArray[np.intp]:
            """Where the kept entries of every query lie in the buffer."""
            out = np.empty(queries * mask.n_survivors, np.intp)
            index, done = mask.index(), 0
            for parameter, count in zip(layout.parameters, mask.counts().tolist(), strict=True):
                for query in range(queries):
                    name, part = parameter.name, index[done : done + count]
                    if name in joint:
                        part = part + np.int32(query * parameter.size)
                    elif queries > 1:
                        name = query_name(name, query)
                    first = query * mask.n_survivors + done
                    for start in range(0, count, _PIECE):  # 20 bytes an entry are in between
                        piece = part[start : start + _PIECE]
                        if name in rules:
                            piece = rules[name].positions(sizes[name], piece)
                        written = out[first + start : first + start + piece.size]
                        np.add(piece, starts[name], out=written, casting="unsafe")
                done += count
            return out

        if filled is not None:
            self._buffer[places(Mask.dense(layout))] = np.tile(filled, queries)
        self._scatter = Scatter(places(mask))
        self.feeds: dict[str, NDArray[np.float32]] = {
            name: self._buffer[start : start + math.prod(shapes[name])].reshape(shapes[name])
            for name, start in starts.items()
        }

    @classmethod
    def of_session(
        cls,
        session: Any,
        layout: Layout,
        mask: Mask,
        queries: int = 1,
        *,
        filled: NDArray[np.float32] | None = None,
    ) -> BlockedWeights:
        """For a loaded variant.

        Raises:
            ArtifactError: See the class; or the graph says nothing about placements.
        """
        properties = session.get_modelmeta().custom_metadata_map
        shapes = {value.name: value.shape for value in session.get_inputs()}
        return cls(shapes, properties.get(PLACEMENTS_KEY, ""), layout, mask, queries, filled)

    def write(self, weights: NDArray[np.float32]) -> None:
        """Put ``weights``, contiguous, into the tensors.

        Args:
            weights: ``float32[n_survivors]``, or ``float32[n, n_survivors]`` for the first ``n`` queries.
        """
        self._scatter.write(weights.reshape(-1), self._buffer)
