"""Figures by matplotlib, which only experiments need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..protocol.errors import ConfigError
from .experiment import Experiment
from .report import Report

__all__ = ["COLOURS", "check_matplotlib", "save_figure"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Told apart with any kind of colour vision (Okabe and Ito)."""
SUFFIXES = (".png", ".svg")
_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 110.0,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "svg.hashsalt": "fedzo",
}


def check_matplotlib(path: Path) -> None:
    """Say before a long run that its figure cannot be written.

    Raises:
        ConfigError: Matplotlib is not installed, or the file has another suffix than ``.png`` and ``.svg``.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"the figure is {path.name}", hint=f"use a name that ends in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib", hint="pip install 'fedzo[experiments]'")


def save_figure(experiment: Experiment, report: Report, path: Path) -> None:
    """Draw the figure of a report into a file.

    Raises:
        ConfigError: See :func:`check_matplotlib`; or the file cannot be written.
    """
    check_matplotlib(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=experiment.size_inches, layout="constrained")
        experiment.draw(report, figure)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
