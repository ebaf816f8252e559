"""What every method learns for a budget of sample-forwards (SF).

``python -m benchmarks.learning --json --data-folder DATA --resume rows.jsonl [--only PATTERN] [--seeds 0,1,2]``
``python -m benchmarks.learning --committed`` prints the committed result, ``--picture FILE`` draws it.

A cell is a run of the machines, graphs and estimators of real runs by :mod:`fedzo.simulation`, in a process of its own
with one thread; LeNet-5. Its budget decides the number of rounds: training may cost so many SF, one SF being a sample
once through the whole network, and parts of it count by their multiply-accumulates. Accuracy is that on the full test
set after the last round, never the best one. Hyper-parameters come from ``settings.py`` and the search (``search.py``).
Runs may be done in pieces: rows go to ``--resume`` one by one, and a cell with a row there is not run again unless its
settings changed.

Figures are medians over the seeds, in percent. ``{data}_{method}_{budget}``: one device that holds all data, dense.
``baseline`` is BAFFLE's form, ``ours`` the best zeroth-order estimator, ``local`` the one with a loss for each stage,
which is not zeroth-order; ``backprop`` is torch with Adam, 3 SF a sample. ``sf_ratio_{data}``: SF of ours to reach the
baseline's final accuracy over the SF at which the baseline first has it. ``pruned80_minus_dense_{data}``: ours with
80 % of the weights removed; pruning passes are not in the budget, their SF stand in the rows.
``dirichlet01_minus_iid_{data}``: 50 devices, 16 a round. ``settings.absent`` lists cells without a row.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedzo.edge_runtime.inference.ort import runtime_version
from fedzo.protocol.errors import FedzoError

from ..report import Report
from .cells import selected, table
from .data import FILES, find
from .figures import CURVE_DIGITS, absent, figures, newest
from .jobs import read_rows, run_cells
from .options import add_options, changes, numbers
from .picture import draw

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results" / "learning.json"
_COLUMNS = ("key", "accuracy", "sample_forwards", "seconds", "loss_queries", "bytes_up_per_device_round")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--committed", action="store_true", help="print the committed result, run nothing")
    parser.add_argument("--list", action="store_true", help="print the cells and which have a row, run nothing")
    parser.add_argument("--report-only", action="store_true", help="report on the rows that are there, run nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the committed result as .svg or .png")
    parser.add_argument("--any-settings", action="store_true", help="report rows of other settings too")
    options = parser.parse_args()
    if options.committed:
        sys.stdout.write(COMMITTED.read_text(encoding="utf-8"))
        return 0
    try:
        if options.picture is not None:
            draw(json.loads(COMMITTED.read_text(encoding="utf-8"))["rows"], options.picture)
            return 0
        return _run(options)
    except FedzoError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    cells = table(numbers(options.seeds), changes(options.set), options.budget_scale)
    wanted = selected(cells, options.only)
    if options.list or options.report_only:
        rows = read_rows(options.resume) if options.resume else []
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = run_cells(
                wanted, options.data_folder, options.work or Path(folder), jobs=options.jobs, resume=options.resume
            )
    good = [_compact(row) for row in newest(rows, wanted, any_settings=options.any_settings)]
    if options.list:
        missing = absent(good, wanted)
        print("\n".join(f"{'-' if cell.key in missing else 'x'} {cell.key}" for cell in wanted))
        return 0
    settings: dict[str, Any] = {
        "seeds": options.seeds,
        "budget_scale": options.budget_scale,
        "jobs": options.jobs,
        "absent": absent(good, wanted),
        "data_absent": [name for name in FILES if name != "digits" and find(options.data_folder, name) is None],
        "onnxruntime": runtime_version(),
        "torch": torch.__version__,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }
    shown = good if options.json else [{name: row.get(name, "") for name in _COLUMNS} for row in good]
    Report(settings, shown, figures(good)).write(as_json=options.json)
    return 0 if options.report_only or len(good) == len(wanted) else 1


def _compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with shorter numbers."""
    short = {name: float(f"{value:.8g}") if isinstance(value, float) else value for name, value in row.items()}
    return {**short, "curve": [[round(sf), round(accuracy, CURVE_DIGITS)] for sf, accuracy in row["curve"]]}


if __name__ == "__main__":
    sys.exit(main())
