"""What an experiment is, and which there are."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NAMES", "Experiment", "find"]

NAMES = (
    "saliency-inputs",
    "gradient-error",
    "wire-bytes",
    "federation-error",
    "best-k",
    "input-scale",
    "deeper-nets",
    "methods",
    "attacks",
)
"""Of the modules of this package that hold an ``EXPERIMENT``, with ``-`` for ``_``."""


@dataclass(frozen=True)
class Experiment:
    """One question and how it is answered.

    Attributes:
        question: One line.
        add_options: Adds options beside those that all experiments have.
        measure: Runs it. The options have ``data`` (see :func:`.data.load_images`) and ``seeds``, a number of seeds
            from 0.
        draw: Draws the figure of a report.
        table: The table of a report.
        size_inches: Of the figure.
    """

    question: str
    add_options: Callable[[ArgumentParser], None]
    measure: Callable[[Namespace], Report]
    draw: Callable[[Report, Figure], None]
    table: Callable[[Report], Table]
    size_inches: tuple[float, float] = (9.0, 3.6)


def find(name: str) -> Experiment:
    """The experiment of that name, one of :data:`NAMES`."""
    found = importlib.import_module(f".{name.replace('-', '_')}", __package__).EXPERIMENT
    assert isinstance(found, Experiment)
    return found
