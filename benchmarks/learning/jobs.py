"""Cells in processes of their own, some side by side; every row goes to a file as soon as it is there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from fedzo.protocol.errors import DataError

from .cells import Cell

__all__ = ["read_rows", "run_cells"]

_ROOT = Path(__file__).resolve().parents[2]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, oldest first; a last line that was cut off is left out.

    Raises:
        DataError: Another line is damaged.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: {error}", hint="remove that line") from error
    return rows


def run_cells(
    cells: Sequence[Cell],
    data_folder: Path,
    work: Path,
    *,
    jobs: int = 1,
    resume: Path | None = None,
    done: Callable[[Mapping[str, Any]], bool] = lambda row: row.get("accuracy") is not None,
) -> list[dict[str, Any]]:
    """Run what has no row yet, in this order.

    Args:
        cells: What is wanted.
        data_folder: With the ``.npz`` files.
        work: Folder that cells share.
        jobs: Processes side by side.
        resume: File of rows, one JSON object a line; made if it is not there.
        done: Whether a row that is there will do.

    Returns:
        All rows of the file and the new ones, oldest first.
    """
    rows = read_rows(resume) if resume is not None else []
    good = [row for row in rows if done(row)]
    missing = [cell for cell in cells if not any(cell.is_of(row) for row in good)]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are there", file=sys.stderr, flush=True)
    lock = Lock()
    if resume is not None and resume.exists():
        text = resume.read_bytes()
        if text and not text.endswith(b"\n"):  # a cut line ends here
            resume.write_bytes(text[: text.rfind(b"\n") + 1])

    def note(row: dict[str, Any]) -> None:
        with lock:
            rows.append(row)
            if resume is not None:
                with resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            said = row.get("error") or f"{100 * row['accuracy']:.2f} % in {row['seconds']:.0f} s"
            print(f"{row['key']}: {said}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(max_workers=jobs) as threads:
        futures = [threads.submit(_run, cell, data_folder, work) for cell in missing]
        try:
            for future in as_completed(futures):
                note(future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return rows


def _run(cell: Cell, data_folder: Path, work: Path) -> dict[str, Any]:
    asked: dict[str, Any] = {"cell": dataclasses.asdict(cell), "data": str(data_folder), "work": str(work)}
    command = [sys.executable, "-m", "benchmarks.learning.measure"]
    environment = {**os.environ, **_ONE_THREAD}
    found = subprocess.run(
        command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, cwd=_ROOT, env=environment, check=False
    )
    if found.returncode:
        return {"key": cell.key, **asked["cell"], "accuracy": None, "error": f"exit code {found.returncode}"}
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row
