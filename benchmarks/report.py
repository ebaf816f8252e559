"""What every benchmark shares: the machine it ran on, timing, and one report as JSON or as a table.

A report has four keys: ``machine``, ``settings``, ``rows`` (one measurement each) and ``figures`` (the numbers that
texts quote, by name).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedzo.experiments.machine import machine

__all__ = ["Report", "machine", "median_s", "positive", "whole"]


def whole(text: str) -> int:
    """A number of things, 1 or more, for :mod:`argparse`."""
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")


def positive(text: str) -> float:
    """A finite number above 0, for :mod:`argparse`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0.0 < value < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def median_s(call: Callable[[int], object], repeats: int, *, number: int = 1) -> float:
    """Median seconds of one ``call(k)`` over ``repeats`` timings of ``number`` calls; ``k`` counts the calls."""
    times = []
    for repeat in range(repeats):
        start = time.perf_counter()
        for k in range(number):
            call(repeat * number + k)
        times.append((time.perf_counter() - start) / number)
    return statistics.median(times)


@dataclass(frozen=True)
class Report:
    """The result of one benchmark.

    Attributes:
        settings: What was asked for.
        rows: Measurements; the table has a column for every key, empty where a row lacks it.
        figures: Numbers that texts quote.
    """

    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]

    def write(self, *, as_json: bool) -> None:
        """Print one JSON object, or a table for people, to standard output."""
        if as_json:
            data = {"machine": machine(), "settings": self.settings, "rows": self.rows, "figures": self.figures}
            sys.stdout.write(json.dumps(data) + "\n")
            return
        host = machine()
        print(f"{host['cpu']}, {host['cores']} cores, Python {host['python']}, numpy {host['numpy']}")
        print(", ".join(f"{key} {value}" for key, value in self.settings.items()))
        header = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [header, *([_text(row.get(key, "")) for key in header] for row in self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        for name, value in self.figures.items():
            print(f"{name}: {_text(value)}")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
