"""Options that the benchmark, its search and the experiments share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedzo.protocol.errors import ConfigError

from ..report import positive, whole

__all__ = ["add_options", "changes", "numbers"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What runs, with what, and where its rows go."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="as fashion*/ours/dense/*/3m/0")
    parser.add_argument("--seeds", default="0,1,2", help="of the cells (default %(default)s)")
    parser.add_argument("--jobs", type=whole, default=1, help="cells side by side (default %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="rows, one a line: read, and appended to")
    parser.add_argument("--budget-scale", type=positive, default=1.0, help="part of each budget (default %(default)s)")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="with the .npz files, see data.py")
    parser.add_argument("--work", type=Path, help="folder for artifacts and unpacked data (default: a temporary one)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="as k=16, or ours.k=16")


def changes(entries: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as a dictionary; values are JSON, or else text.

    Raises:
        ConfigError: There is no ``=``.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not sign or not name:
            raise ConfigError(f"{entry!r} is not NAME=VALUE")
        found[name] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def numbers(text: str) -> list[int]:
    """``0,1,2``.

    Raises:
        ConfigError: One of them is no whole number.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"the seeds {text!r} are not whole numbers with commas between them") from error
    if min(found) < 0:
        raise ConfigError(f"the seed {min(found)} is below 0")
    return found
