"""How soon a server that was killed announces the next round, with a long run in its journal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.protocol.errors import FedzoError
from fedzo.simulation.shared import SharedParts

from .boards import Fleet
from .rounds import BATCH, RUN, SPARE_FILES, blobs_of, serve_options
from .server import ServerProcess, raise_file_limit

__all__ = ["measure_recovery"]

_SPARE_ROUNDS = 10


def measure_recovery(
    artifact: Path, folder: Path, devices: int, rounds: int, k: int, times: int
) -> list[dict[str, Any]]:
    """Run a fleet for so many rounds, then kill -9 the server in the middle of a round, several times.

    The broker and the boards stay. At the kill half of the round's reports are on their way, the other half follows
    while the server is away; the next round is announced when the new process has all of them.

    Args:
        artifact: Folder of ``fedzo export``.
        folder: Of its own.
        devices: Boards.
        rounds: Rounds in the journal before the first kill.
        k: Directions.
        times: Kills.

    Returns:
        One row a kill: ``recovery_s`` from the kill to the next new announcement at a board, ``republished_s`` to the
        first message of the new server.

    Raises:
        FedzoError: Something did not go as it should.
    """
    raise_file_limit(devices + SPARE_FILES)
    log, rows = folder / "server.log", list[dict[str, Any]]()
    broker = MosquittoBroker(port=0)
    broker.start()
    options = serve_options(artifact, folder, devices, k, rounds=rounds + times + _SPARE_ROUNDS, broker=broker.url)
    process = ServerProcess(options, log)
    address = ("127.0.0.1", broker.port)
    fleet = Fleet(devices, address, SharedParts(), blobs_of(artifact), batch=BATCH, check=process.check)
    try:
        fleet.holds_from = rounds + 1
        fleet.connect(300.0)
        began = time.monotonic()
        fleet.until(lambda: len(fleet.seen.updates) >= rounds, f"{rounds} rounds", 60.0 + 5.0 * rounds)
        run_s = time.monotonic() - began
        for _ in range(times):
            fleet.until(lambda: len(fleet.held) == devices, "all reports", 60.0)
            round_, births = max(fleet.seen.heads), fleet.seen.births
            fleet.release(devices // 2)
            killed = time.monotonic()
            process.kill()
            process = ServerProcess(["--resume", folder / "runs" / RUN], log)
            fleet.check = process.check
            fleet.release()
            fleet.until(lambda n=births: fleet.seen.births > n, "the new server", 120.0)  # type: ignore[misc]
            republished_s = time.monotonic() - killed
            fleet.until(lambda n=round_: max(fleet.seen.heads) > n, "the next round", 120.0)  # type: ignore[misc]
            rows.append(
                {
                    "devices": devices,
                    "round": round_,
                    "recovery_s": fleet.seen.heads[round_ + 1] - killed,
                    "republished_s": republished_s,
                    "journal_mb": _size_mb(folder / "runs" / RUN),
                    "run_s": run_s,
                }
            )
    finally:
        fleet.close()
        process.close()
        broker.stop()
    if len(rows) != times:
        raise FedzoError(f"{len(rows)} recoveries instead of {times}")
    return rows


def _size_mb(run: Path) -> float:
    """The journal with its write-ahead log."""
    return sum(path.stat().st_size for path in run.glob("journal*")) / 1e6
