"""Measurements in a process of their own: its peak is that of the work, and what kills it kills nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ...protocol.errors import FedzoError

__all__ = ["answer_of"]


def answer_of(module: str, arguments: Sequence[str], *, timeout_s: float = 600.0) -> dict[str, Any]:
    """Run ``python -m module`` as a device is run, and read the JSON object on its stdout.

    Raises:
        FedzoError: The module says so, with the exit code of the error there; it died, or took too long.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FedzoError(f"{module} took more than {timeout_s:g} s") from None
    except OSError as error:
        raise FedzoError(f"{module} cannot be started: {error.strerror or error}") from error
    if done.returncode < 0:
        raise FedzoError(f"{module} died with signal {_name(-done.returncode)}", hint="try: fedzo-device doctor")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FedzoError(f"{module} failed: {line[:300]}") from None
    if "error" in answer:
        failure = answer["error"]
        general = FedzoError.exit_code
        kinds = {kind.exit_code: kind for kind in FedzoError.__subclasses__() if kind.exit_code != general}
        raise kinds.get(failure["exit_code"], FedzoError)(failure["message"], hint=failure["hint"])
    return answer


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
