"""The parameters of a model as one flat vector: names, shapes, offsets, what a mask may remove.

Every trainable parameter of an exported model has one entry, in the order in which the graph first uses it. A tensor
that must not be trained is a constant of the graph and has no entry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError
from ..perturbation.quantiles import gaussian_table
from ..perturbation.streams import Purpose, uint16s

__all__ = ["Initialiser", "Layout", "Parameter", "initial_weights"]

InitialiserKind = Literal["normal", "uniform", "constant"]
_KINDS: tuple[InitialiserKind, ...] = ("normal", "uniform", "constant")
MAX_PARAMETERS = 4096
MAX_SIZE = 1 << 28
_STEP = 1 << 16
_LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Initialiser:
    """How a parameter gets its first values from the run seed.

    Attributes:
        kind: ``normal`` (mean 0, standard deviation ``scale``), ``uniform`` on ``(-scale, scale)``, or ``constant``
            (every entry is ``scale``).
        scale: A number that float32 holds exactly.
    """

    kind: InitialiserKind
    scale: float

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ArtifactError(f"initialiser kind {self.kind!r} is not one of {', '.join(_KINDS)}")
        if not abs(self.scale) <= _LARGEST_SCALE or float(np.float32(self.scale)) != self.scale:
            raise ArtifactError(f"initialiser scale {self.scale!r} is not a finite float32 value")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trainable tensor.

    Attributes:
        name: Its name in the graph.
        shape: Its dense shape.
        maskable: Whether pruning may remove entries (weights yes; biases and normalisation no).
        initialiser: Its first values.
    """

    name: str
    shape: tuple[int, ...]
    maskable: bool
    initialiser: Initialiser

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 256:
            raise ArtifactError(f"parameter name {self.name[:40]!r} is empty or longer than 256 characters")
        if any(not isinstance(n, int) or n < 1 for n in self.shape) or len(self.shape) > 8:
            raise ArtifactError(f"parameter {self.name!r} has the impossible shape {self.shape}")

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The dense flat vector of a model: parameters one after another, each in C order."""

    parameters: tuple[Parameter, ...]
    offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)
    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.parameters) <= MAX_PARAMETERS:
            raise ArtifactError(f"a layout holds 1 to {MAX_PARAMETERS} parameters, not {len(self.parameters)}")
        names = [p.name for p in self.parameters]
        if len(set(names)) != len(names):
            raise ArtifactError("two parameters of the layout share a name")
        ends = list(accumulate((p.size for p in self.parameters), initial=0))
        if ends[-1] > MAX_SIZE:
            raise ArtifactError(f"the layout has {ends[-1]} entries, the limit is {MAX_SIZE}")
        object.__setattr__(self, "offsets", tuple(ends[:-1]))
        object.__setattr__(self, "size", ends[-1])

    @property
    def maskable_size(self) -> int:
        """Number of entries that a mask may remove."""
        return sum(p.size for p in self.parameters if p.maskable)

    def slice_of(self, position: int) -> slice:
        """Where parameter ``position`` lies in the flat vector."""
        start = self.offsets[position]
        return slice(start, start + self.parameters[position].size)

    def position_of(self, name: str) -> int:
        """Index of the parameter called ``name``.

        Raises:
            ArtifactError: There is none.
        """
        for position, parameter in enumerate(self.parameters):
            if parameter.name == name:
                return position
        raise ArtifactError(f"the layout has no parameter {name!r}")

    def maskable(self) -> NDArray[np.bool_]:
        """Which entries a mask may remove: ``bool[size]``, owned by the caller."""
        out = np.zeros(self.size, dtype=np.bool_)
        for position, parameter in enumerate(self.parameters):
            out[self.slice_of(position)] = parameter.maskable
        return out

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, in the order of the flat vector."""
        return [
            {
                "name": p.name,
                "shape": list(p.shape),
                "maskable": p.maskable,
                "init": p.initialiser.kind,
                "scale": p.initialiser.scale,
            }
            for p in self.parameters
        ]

    @classmethod
    def from_json(cls, data: object) -> Layout:
        """Inverse of :meth:`to_json`; checks every field.

        Raises:
            ArtifactError: ``data`` is no layout.
        """
        if not isinstance(data, list) or len(data) > MAX_PARAMETERS:
            raise ArtifactError("the layout is not a list of parameters")
        return cls(tuple(_parameter(item) for item in data))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON text."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()


def _parameter(item: object) -> Parameter:
    if not isinstance(item, Mapping):
        raise ArtifactError("a parameter of the layout is not an object")
    name, shape, maskable = item.get("name"), item.get("shape"), item.get("maskable")
    kind, scale = item.get("init"), item.get("scale")
    if (
        not isinstance(name, str)
        or not isinstance(shape, list)
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
        or not isinstance(maskable, bool)
        or kind not in _KINDS
        or isinstance(scale, bool)
        or not isinstance(scale, (int, float))
        or not abs(scale) <= _LARGEST_SCALE
    ):
        raise ArtifactError(f"parameter {name!r} of the layout is malformed")
    return Parameter(name, tuple(shape), maskable, Initialiser(kind, float(scale)))


def initial_weights(layout: Layout, seed: int) -> NDArray[np.float32]:
    """The first weights of a run, from the seed alone and bit-exact everywhere.

    A normal entry is table value times scale, one float32 product; a uniform entry is ``(2 u + 1 - 65536) / 65536``
    times scale, where the first factor is exact.

    Returns:
        ``float32[layout.size]``, owned by the caller.
    """
    out = np.empty(layout.size, dtype=np.float32)
    for position, parameter in enumerate(layout.parameters):
        part = out[layout.slice_of(position)]
        scale = np.float32(parameter.initialiser.scale)
        if parameter.initialiser.kind == "constant":
            part[:] = scale
            continue
        bits = uint16s(seed, Purpose.INIT, 0, position, parameter.size)
        if parameter.initialiser.kind == "normal":
            for start in range(0, parameter.size, _STEP):  # numpy makes indices of 8 bytes out of them
                stop = min(start + _STEP, parameter.size)
                np.take(gaussian_table(), bits[start:stop], out=part[start:stop], mode="clip")
        else:
            part[:] = bits
            np.multiply(part, np.float32(2.0), out=part)
            np.subtract(part, np.float32(65535.0), out=part)
            np.multiply(part, np.float32(2.0**-16), out=part)
        np.multiply(part, scale, out=part)
    return out
