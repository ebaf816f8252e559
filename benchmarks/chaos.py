"""Chaos for a while: kill -9 of server, broker and boards, partitions, a broker that loses its disk.

    python -m benchmarks.chaos --minutes 5 --seed 1

`tests/end_to_end/chaos.py` says what is done and what must hold. Ends with 1 when something does not hold, and leaves
the folder with logs and journals then.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.end_to_end.chaos import episode, undisturbed
from tests.end_to_end.fleet import Fleet
from tests.end_to_end.materials import make_artifact, make_data


def main() -> int:
    """Episodes until the time is over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--boards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200, help="of an episode")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and journals")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedzo-chaos-"))
    data, artifact = make_data(folder, options.boards + 1), make_artifact(folder)
    fleets = itertools.count()

    def make_fleet(boards: int, **settings: Any) -> Fleet:
        path = folder / f"fleet-{next(fleets)}"
        path.mkdir()
        return Fleet(path, artifact, data[:boards], data[-1], **settings)

    deadline = time.monotonic() + 60 * options.minutes
    expected = undisturbed(make_fleet, options.boards, options.rounds)
    totals: Counter[str] = Counter()
    for number in itertools.count():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        quorum = options.boards - number % 2
        place = folder / f"episode-{number}"
        place.mkdir()
        found = episode(
            make_fleet, place, boards=options.boards, quorum=quorum, rounds=options.rounds, seconds=left_s,
            seed=f"{options.seed}/{number}", expected=expected if quorum == options.boards else None,
        )  # fmt: skip
        totals.update(found["disturbances"])
        totals.update({"episodes": 1, "updates": found["updates"], "receipts": found["receipts"]})
        print(f"episode {number}, quorum {quorum} of {options.boards}: {found}", flush=True)
    print(f"all held: {dict(totals)}", flush=True)
    if not options.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
