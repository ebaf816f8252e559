"""Plays schedules by number: ``python -m tests.protocol.exactly_once --count 100000 --jobs 2``.

A schedule is a function of its number and of this code. A failure prints the number; ``--first NUMBER --count 1
--verbose`` plays it again step by step.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.protocol.exactly_once.world import play

CHUNK = 50


def failures(first: int, count: int) -> list[tuple[int, str]]:
    """Numbers of the schedules that failed, with the reasons."""
    found = []
    for number in range(first, first + count):
        try:
            play(number)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other schedules are played all the same)
            found.append((number, f"{type(error).__name__}: {error}"))
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol.exactly_once", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print every step")
    arguments = parser.parse_args()
    if arguments.verbose:
        for number in range(arguments.first, arguments.first + arguments.count):
            play(number, verbose=True)
        return 0
    started, played, failed = time.monotonic(), 0, 0
    chunks = [
        (start, min(CHUNK, arguments.first + arguments.count - start))
        for start in range(arguments.first, arguments.first + arguments.count, CHUNK)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for (_, size), found in zip(chunks, pool.map(failures, *zip(*chunks, strict=True)), strict=True):
            for number, reason in found:
                print(f"schedule {number}: {reason}", flush=True)  # noqa: T201 (a command)
            played, failed = played + size, failed + len(found)
            if played % 1000 == 0 or played == arguments.count:
                elapsed_s = time.monotonic() - started
                print(f"{played} schedules, {failed} failed, {elapsed_s:.0f} s", flush=True)  # noqa: T201 (a command)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
