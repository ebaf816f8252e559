"""Files of an artifact: the portable graphs, their memory, and variants for particular machines or several queries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from .query_layout import MAX_QUERIES

__all__ = ["GraphFile", "GraphMemory", "GraphVariant"]

_MAX_WEIGHT_BYTES = 4 << 30
_MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph of the artifact.

    Attributes:
        name: File name: one of :data:`~fedzo.protocol.artifact.manifest.GRAPHS`, or a variant's.
        sha256: Hash of its bytes, 32 bytes.
        size: Its length in bytes.
    """

    name: str
    sha256: bytes
    size: int


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """Tensor bytes of one graph, as its arena needs them.

    At batch ``B`` they are ``max(fixed + per_sample * B for fixed, per_sample in envelope)``, without the feeds and
    without the copies of the surviving weights and their indices.

    Attributes:
        name: The graph.
        envelope: Pairs ``(fixed_bytes, bytes_per_sample)``.
        constants: Bytes of the tensors that the file holds.
        unfolded: Most that a convolution takes to unfold one sample, as releases of ONNX Runtime do that came before
            1.32; None in artifacts of older versions.
    """

    name: str
    envelope: tuple[tuple[int, int], ...]
    constants: int = 0
    unfolded: int | None = None

    def live_bytes(self, batch: int) -> int:
        """Bytes at ``batch`` samples."""
        return max(fixed + per_sample * batch for fixed, per_sample in self.envelope)

    def to_json(self) -> list[list[int]] | dict[str, Any]:
        """Plain data; the pairs alone, as artifacts of older versions have them, if there is nothing else."""
        pairs = [list(pair) for pair in self.envelope]
        if self.unfolded is None:
            return pairs
        return {"envelope": pairs, "constants": self.constants, "unfolded": self.unfolded}

    @classmethod
    def from_json(cls, name: str, raw: object) -> GraphMemory:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: It is no such data; also KeyError and TypeError.
        """
        whole: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {"envelope": raw}
        pairs = tuple((_count(fixed), _count(per_sample)) for fixed, per_sample in whole["envelope"])
        if not pairs or len(name) > _MAX_NAME:
            raise ValueError(f"the memory plan of {name[:_MAX_NAME]!r} is empty")
        unfolded = _count(whole["unfolded"]) if "unfolded" in whole else None
        return cls(name, pairs, _count(whole.get("constants", 0)), unfolded)


@dataclass(frozen=True, slots=True)
class GraphVariant:
    """A graph that may run in place of a portable one, which it must equal but for rounding.

    It is made for one kind of machine, or for several queries in one run, or for both. Its weights are inputs of their
    own, in the shapes that the kernels read; where each entry lies, the file says (:mod:`.placement`).
    Nobody needs a variant: a device without it runs the portable graph.

    Attributes:
        file: The file; its name has a middle part, such as ``probe.nchwc16.onnx``.
        graph: The portable graph, ``probe.onnx``.
        machine: Processor family, ``x86_64``, or ``any``.
        onnxruntime: The one release of ONNX Runtime that can run it; ``any`` for any machine.
        block: Channels in a block of that machine's kernels, 8 or 16; 0 for any machine.
        weight_bytes: Size of all weight inputs, with padding; held as long as the graph is loaded.
        queries: Sets of weights that one run evaluates (:mod:`fedzo.protocol.artifact.query_layout`).
    """

    file: GraphFile
    graph: str
    machine: str
    onnxruntime: str
    block: int
    weight_bytes: int
    queries: int = 1

    def __post_init__(self) -> None:
        if (
            not re.fullmatch(r"[a-z]+\.[a-z0-9]+\.onnx", self.file.name)
            or self.graph != "probe.onnx"
            or not 1 <= self.queries <= MAX_QUERIES
            or (self.machine == "any" and (self.onnxruntime != "any" or self.block != 0 or self.queries == 1))
            or (self.machine != "any" and (self.machine != "x86_64" or self.block not in (8, 16)))
            or not re.fullmatch(r"[0-9A-Za-z.+]{1,32}", self.onnxruntime)
            or not 0 < self.weight_bytes <= _MAX_WEIGHT_BYTES
        ):
            raise ArtifactError(f"the manifest has an impossible variant {self.file.name!r} of {self.graph!r}")


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no count")
    return value
