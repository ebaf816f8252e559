"""What an experiment reports: machine, settings, one row a measurement, and the numbers that texts quote."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..edge_runtime.inference.ort import runtime_version
from ..protocol.errors import DataError
from .machine import machine

__all__ = ["KEYS", "Report", "Table", "text"]

KEYS = ("machine", "settings", "rows", "figures")
_DIGITS = 6

Table = Sequence[Sequence[str]]
"""Cells of a table for people; the first row is the heading."""


@dataclass(frozen=True)
class Report:
    """The result of one experiment.

    Attributes:
        machine: Where it ran.
        settings: What was asked for, with seeds and date.
        rows: Measurements, all with the same keys.
        figures: Numbers that texts quote, by name.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]

    @classmethod
    def made(
        cls, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, float]
    ) -> Report:
        """A report of this machine and this day."""
        day = dt.datetime.now(dt.timezone.utc).date().isoformat()
        return cls({**machine(), "onnxruntime": runtime_version()}, {**settings, "date": day}, rows, figures)

    def encode(self) -> str:
        """One JSON object, numbers with six significant digits, one row a line."""
        rows = ",\n  ".join(json.dumps(_rounded(row), allow_nan=False) for row in self.rows)
        parts = (
            f'"machine": {json.dumps(dict(self.machine))}',
            f'"settings": {json.dumps(dict(self.settings))}',
            f'"rows": [\n  {rows}\n ]',
            f'"figures": {json.dumps(_rounded(self.figures), indent=2, allow_nan=False)}',
        )
        return "{" + ",\n ".join(parts) + "}\n"

    @classmethod
    def decode(cls, data: str, name: str) -> Report:
        """Inverse of :meth:`encode`.

        Raises:
            DataError: It is no report; ``name`` is what the message calls it.
        """
        try:
            found = json.loads(data)
            return cls(*(found[key] for key in KEYS))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name} is no result of an experiment: {error}") from None


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _round(value) for key, value in values.items()}


def _round(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None
    return int(value) if isinstance(value, np.integer) else value


def text(value: object) -> str:
    """A cell of a table: four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
