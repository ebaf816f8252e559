"""What one run of a graph computes and moves, from which its time on a board is estimated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError

__all__ = ["GraphWork"]


@dataclass(frozen=True, slots=True)
class GraphWork:
    """Work of ``probe.onnx``: at batch ``B``, ``per_sample * B`` and what each run takes besides.

    Attributes:
        sample_multiply_accumulates: Of the convolutions and matrix products, for one sample.
        sample_bytes: Tensors read and written for one sample, counted at each operator.
        run_bytes: Tensors read and written in each run whatever the batch: weights, and what they are scattered from.
        operators: That compute; views of a tensor do not count.
    """

    sample_multiply_accumulates: int
    sample_bytes: int
    run_bytes: int
    operators: int

    def __post_init__(self) -> None:
        if any(type(value) is not int or not 0 <= value < 1 << 53 for value in dataclasses.astuple(self)):
            raise ArtifactError(f"the manifest has impossible work: {self}")

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> GraphWork:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: A number is missing or impossible.
        """
        try:
            return cls(**{field.name: raw[field.name] for field in dataclasses.fields(cls)})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the manifest has malformed work: {error!r}") from None
