"""Runs one experiment: ``python -m fedzo.experiments NAME [--data NAME=FILE.npz] [--json] [--figure FILE.png]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..protocol.errors import ConfigError, FedzoError
from .data import DIGITS
from .experiment import NAMES, Experiment, find
from .pictures import check_matplotlib, save_figure
from .report import Report

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fedzo.experiments", description="Measure one claim of the paper.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in NAMES:
        experiment = find(name)
        one = commands.add_parser(name, help=experiment.question, description=experiment.question)
        one.add_argument(
            "--data",
            nargs="+",
            default=[DIGITS],
            metavar="NAME=FILE",
            help="digits, or NAME=FILE.npz with arrays x, y, xt, yt, float32 NCHW and normalised (default: digits)",
        )
        one.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
        one.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        one.add_argument("--figure", type=Path, metavar="FILE", help="draw the figure, .png or .svg")
        one.add_argument("--from", dest="source", type=Path, metavar="FILE", help="take a JSON result, run nothing")
        experiment.add_options(one)
    return parser


def _report(experiment: Experiment, options: argparse.Namespace) -> Report:
    if options.source is None:
        return experiment.measure(options)
    try:
        data = options.source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{options.source} cannot be read: {error}") from None
    return Report.decode(data, str(options.source))


def _print(experiment: Experiment, report: Report) -> None:
    cells = [list(row) for row in experiment.table(report)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    out = [f"{experiment.question}", f"{report.machine['cpu']}, {report.settings['date']}", ""]
    out += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    out += ["", *(f"{name}: {value:.4g}" for name, value in report.figures.items())]
    sys.stdout.write("\n".join(out) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is that of the error, if there is one."""
    options = _parser().parse_args(arguments)
    experiment = find(options.name)
    try:
        if not 1 <= options.seeds <= 100:
            raise ConfigError(f"the number of seeds is {options.seeds}, it must be 1 to 100")
        if options.figure is not None:
            check_matplotlib(options.figure)
        report = _report(experiment, options)
        if options.figure is not None:
            save_figure(experiment, report, options.figure)
    except FedzoError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    if options.json:
        sys.stdout.write(report.encode())
    else:
        _print(experiment, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
