"""How soon a server that was killed announces the next round, with a long run in its journal and boards that go on."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.broker_server.journal import SqliteJournal
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import RunDocument
from fedzo.protocol.wire.messages import UpdateRecord
from fedzo.simulation.shared import SharedParts

from ..recovery import make_run
from .boards import Fleet
from .rounds import BATCH, SPARE_FILES, blobs_of
from .server import ServerProcess, raise_file_limit

__all__ = ["measure_recovery"]


class _PartsOfVeterans(SharedParts):
    """What boards have that took part in all rounds so far.

    Args:
        records: The log.
    """

    def __init__(self, records: Sequence[UpdateRecord]) -> None:
        super().__init__()
        self._log_so_far, self._veteran = records, list[Replica]()

    def replica(self, run: RunDocument, manifest: Manifest, mask: Mask) -> Replica:
        """At the end of the log."""
        if not self._veteran:
            first = super().replica(run, manifest, mask)
            for record in self._log_so_far:
                first.apply(record)
            self._veteran.append(first)
        return copy.copy(self._veteran[0])


def measure_recovery(folder: Path, devices: int, rounds: int, k: int, times: int) -> list[dict[str, Any]]:
    """Serve a run that has so many rounds behind it, then kill -9 the server in the middle of a round, several times.

    The broker and the boards stay. At the kill half of the round's reports are on their way, the other half follows
    while the server is away; the next round is announced when the new process has all of them.

    Args:
        folder: Empty.
        devices: Boards.
        rounds: Rounds in the journal at the beginning, see :mod:`..long_journal`.
        k: Directions.
        times: Kills.

    Returns:
        One row a kill: ``recovery_s`` from the kill to the next new announcement at a board, ``republished_s`` to the
        first message of the new server, ``cpu_s`` of its processor time until the next round.

    Raises:
        FedzoError: Something did not go as it should.
    """
    raise_file_limit(devices + SPARE_FILES)
    run = make_run(folder, devices, rounds, k)
    with SqliteJournal(run.journal_path, read_only=True) as journal:
        log = [record for _, e in journal.read({"update"}) if isinstance(record := decode(e.payload), UpdateRecord)]
        masks = [entry.payload for _, entry in journal.read({"mask"})]
    blobs = blobs_of(run.artifact_path) | {hashlib.sha256(mask).digest(): mask for mask in masks}
    resume, server_log, rows = ["--resume", run.path], folder / "server.log", list[dict[str, Any]]()
    broker = MosquittoBroker(port=0)
    broker.start()
    (run.path / "serve.json").write_text(json.dumps({"broker": broker.url}))
    process = ServerProcess(resume, server_log)
    address = ("127.0.0.1", broker.port)
    fleet = Fleet(devices, address, _PartsOfVeterans(log), blobs, batch=BATCH, check=process.check)
    try:
        fleet.holds_from = rounds + 2  # half of the open round is in the journal
        fleet.connect(300.0)
        for _ in range(times):
            fleet.until(lambda: len(fleet.held) == devices, "all reports", 120.0)
            round_, births = max(fleet.seen.heads), fleet.seen.births
            fleet.release(devices // 2)
            killed = time.monotonic()
            process.kill()
            process = ServerProcess(resume, server_log)
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
                    "cpu_s": process.cpu_s,
                    "journal_mb": run.journal_path.stat().st_size / 1e6,
                }
            )
    finally:
        fleet.close()
        process.close()
        broker.stop()
    if len(rows) != times:
        raise FedzoError(f"{len(rows)} recoveries instead of {times}")
    return rows
