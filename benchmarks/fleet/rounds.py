"""Rounds of a fleet: how long one takes, and what it costs the server."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.broker_server.journal import SqliteJournal
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.errors import FedzoError
from fedzo.simulation.shared import SharedParts

from .boards import Fleet
from .server import ServerProcess, free_port, raise_file_limit

__all__ = ["BATCH", "RUN", "SPARE_FILES", "RoundsResult", "blobs_of", "measure_rounds", "serve_options"]

RUN = "lenet5-20260101-120000-1234"
"""As long as the name that a run has by default."""
BATCH = 16
SPARE_FILES = 200
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class RoundsResult:
    """What a fleet of one size measured.

    Attributes:
        rows: One per round.
        peak_mib: Peak of the server's process, from its start to the last round.
        enrol_s: From the first connection to the first announced round.
        enrol_cpu_s: Processor time of the server in it.
    """

    rows: list[dict[str, Any]]
    peak_mib: float
    enrol_s: float
    enrol_cpu_s: float

    @property
    def close_s(self) -> float:
        """Median over the rounds, from the first report to the update at a board."""
        return float(statistics.median(row["close_s"] for row in self.rows))

    @property
    def cost_per_report_us(self) -> float:
        """Median over the rounds of the server's processor time for a round, over the reports."""
        return float(statistics.median(row["cpu_us_per_report"] for row in self.rows))


def serve_options(
    artifact: Path, folder: Path, devices: int, k: int, *, rounds: int, port: int, batch: int = BATCH
) -> list[object]:
    """Options of ``fedzo serve`` for a fleet: shared directions, all devices in every round."""
    options = ["--devices", devices, "--quorum", devices, "--rounds", rounds, "--k", k, "--assign", "shared"]
    options += ["--estimator", "stein", "--batch", batch, "--pruning", "random", "--evaluate-every", 0]
    options += ["--deadline", 600, "--enrol-deadline", 900, "--learning-rate", "0.001"]
    place = ["--runs", folder / "runs", "--run", RUN, "--broker", "mosquitto", "--port", port]
    return [artifact, *options, *place]


def blobs_of(artifact: Path) -> dict[bytes, bytes]:
    """What a board has in its store that took part before: the manifest, and graphs, which nobody runs here."""
    loaded = load_artifact(artifact)
    return {graph.sha256: b"" for graph in loaded.manifest.graphs} | {loaded.digest: loaded.manifest_bytes}


def measure_rounds(artifact: Path, folder: Path, devices: int, k: int, rounds: int, **server: Any) -> RoundsResult:
    """Serve a fleet for some rounds after a first one that does not count: in it boards fetch the mask.

    Every round goes like this: all boards get the announcement and make their reports, then all of them send at the
    same moment. The time runs from the first report to the update record at a board, which the server publishes only
    when the reports and the update are in its journal on the disk.

    Args:
        artifact: Folder of ``fedzo export``.
        folder: Of its own.
        devices: Boards.
        k: Directions.
        rounds: To measure.
        server: Further arguments of :class:`ServerProcess`.

    Raises:
        FedzoError: Something did not go as it should.
    """
    raise_file_limit(devices + SPARE_FILES)
    port = free_port()
    options = serve_options(artifact, folder, devices, k, rounds=rounds + 2, port=port)
    process = ServerProcess(options, folder / f"server-{devices}.log", **server)
    fleet = Fleet(devices, ("127.0.0.1", port), SharedParts(), blobs_of(artifact), batch=BATCH, check=process.check)
    rows: list[dict[str, Any]] = []
    try:
        process.await_port(port)
        fleet.holds_from = 0
        start, cpu = time.monotonic(), process.cpu_s
        fleet.connect(TIMEOUT_S)
        fleet.until(lambda: bool(_trained(fleet)), "the first round", TIMEOUT_S)
        enrol_s, enrol_cpu_s = time.monotonic() - start, process.cpu_s - cpu
        for number in range(rounds + 1):
            fleet.until(lambda: len(fleet.held) == devices, "all reports", TIMEOUT_S)
            round_, receipts, cpu = max(fleet.seen.heads), fleet.seen.receipts, process.cpu_s
            began = fleet.release()
            fleet.until(lambda n=round_: n in fleet.seen.updates, "the update", TIMEOUT_S)  # type: ignore[misc]
            fleet.until(lambda: len(fleet.held) == devices, "the next round", TIMEOUT_S)
            if fleet.seen.receipts - receipts != devices or fleet.seen.others:
                raise FedzoError(f"{fleet.seen.receipts - receipts} receipts of {devices} reports: {fleet.seen.others}")
            row = {
                "devices": devices,
                "round": round_,
                "close_s": fleet.seen.updates[round_] - began,
                "announced_to_update_s": fleet.seen.updates[round_] - fleet.seen.heads[round_],
                "cpu_us_per_report": 1e6 * (process.cpu_s - cpu) / devices,
            }
            if number:
                rows.append(row)
        peak_mib = process.peak_mib
    finally:
        fleet.close()
        process.close()
    _check(folder / "runs" / RUN, [row["round"] for row in rows], devices)
    return RoundsResult(rows, peak_mib, enrol_s, enrol_cpu_s)


def _trained(fleet: Fleet) -> list[int]:
    """Rounds beyond the enrolment."""
    return [round_ for round_ in fleet.seen.heads if round_ > 0]


def _check(run: Path, rounds: list[int], devices: int) -> None:
    """Every report of every round is in the journal once."""
    with SqliteJournal(run / "journal.sqlite", read_only=True) as journal:
        reports = [(entry.round, entry.device) for _, entry in journal.read({"report"})]
    for round_ in rounds:
        mine = [device for number, device in reports if number == round_]
        if len(mine) != devices or len(set(mine)) != devices:
            raise FedzoError(f"the journal has {len(mine)} reports of round {round_}, not {devices}")
