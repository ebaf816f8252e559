"""The known answer of an artifact: what its dense initial weights give on a seeded batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..perturbation.quantiles import gaussian_table
from ..perturbation.streams import Purpose, uint16s, uint64s

__all__ = ["Golden", "GoldenPredictions", "golden_batch"]

MAX_GOLDEN_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class GoldenPredictions:
    """What the network answers for each sample of the batch.

    Attributes:
        classes: Index of the largest logit.
        logits: That logit.
        tolerance: Largest allowed absolute difference of a logit.
    """

    classes: tuple[int, ...]
    logits: tuple[float, ...]
    tolerance: float

    @classmethod
    def of_logits(cls, logits: NDArray[np.float32], tolerance: float) -> GoldenPredictions:
        """The predictions in ``logits``, ``float32[batch, n_classes]``."""
        classes = logits.argmax(axis=1)
        largest = np.take_along_axis(logits, classes[:, None], axis=1)[:, 0].astype(np.float64)
        return cls(tuple(classes.tolist()), tuple(largest.tolist()), tolerance)

    def difference(self, logits: NDArray[np.float32]) -> float:
        """How far ``logits``, ``float32[batch, n_classes]``, are from these predictions.

        Returns:
            The largest of: the difference of a stored logit, and half of what another class is above the stored one.
            Two classes that are as good as equal may change places. Infinite when the shapes do not fit.
        """
        if len(logits) != len(self.classes):
            return math.inf
        found = np.take_along_axis(logits, np.array(self.classes)[:, None], axis=1)[:, 0].astype(np.float64)
        moved = np.abs(found - np.array(self.logits))
        above = (logits.max(axis=1).astype(np.float64) - found) / 2
        return float(np.maximum(moved, above).max())


@dataclass(frozen=True, slots=True)
class Golden:
    """A known answer: loss and predictions of the dense initial weights on the batch of :func:`golden_batch`.

    Attributes:
        seed: Of the batch.
        batch: Its number of samples.
        mean_loss: Mean cross-entropy in float64.
        tolerance: Largest allowed absolute difference of the loss.
        predictions: One a sample; None in artifacts of older releases.
    """

    seed: int
    batch: int
    mean_loss: float
    tolerance: float
    predictions: GoldenPredictions | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; without predictions there is no such key, so that older artifacts keep their bytes."""
        data: dict[str, Any] = {
            "seed": self.seed,
            "batch": self.batch,
            "mean_loss": self.mean_loss,
            "tolerance": self.tolerance,
        }
        if self.predictions is not None:
            data["predictions"] = {
                "classes": list(self.predictions.classes),
                "logits": list(self.predictions.logits),
                "tolerance": self.predictions.tolerance,
            }
        return data

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], n_classes: int) -> Golden:
        """Parse and check plain data.

        Raises:
            KeyError: A value is missing.
            TypeError: One has another type.
            ValueError: One is out of range.
        """
        batch = _whole(raw["batch"], MAX_GOLDEN_BATCH)
        if batch < 1:
            raise ValueError("the golden batch has no sample")
        predictions = None
        if "predictions" in raw:
            entry = raw["predictions"]
            predictions = GoldenPredictions(
                tuple(_whole(index, n_classes - 1) for index in entry["classes"]),
                tuple(_finite(logit) for logit in entry["logits"]),
                _finite(entry["tolerance"]),
            )
            if not len(predictions.classes) == len(predictions.logits) == batch:
                raise ValueError(f"the golden batch has {batch} samples, there are other numbers of predictions")
        seed = _whole(raw["seed"], (1 << 64) - 1)
        return cls(seed, batch, _finite(raw["mean_loss"]), _finite(raw["tolerance"]), predictions)


def _whole(value: object, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    if not 0 <= value <= largest:
        raise ValueError(f"{value} is out of range")
    return value


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def golden_batch(
    input_shape: tuple[int, ...], n_classes: int, seed: int, batch: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The seeded batch of the known answer: table normals and uniform labels.

    Returns:
        ``x float32[batch, *input_shape]`` and ``y int64[batch]``, owned by the caller.
    """
    bits = uint16s(seed, Purpose.GOLDEN, 0, 0, batch * math.prod(input_shape))
    x = np.take(gaussian_table(), bits, mode="clip").reshape(batch, *input_shape)
    labels = uint64s(seed, Purpose.GOLDEN, 0, 1, batch) % np.uint64(n_classes)
    return x, labels.astype(np.int64)
