"""How soon a server announces the next round after a kill -9, by the length of the run that its journal holds.

``python -m benchmarks.recovery [--json] [--devices 1000] [--rounds 1000] [--k 100] [--repeats 5]``

The journal is written by :mod:`.long_journal`: LeNet-5 on 32x32 images, 80 % of the weights pruned, the same ``K``
directions for all devices, every device in every round; at its end half of a round's reports are there. ``fedzo serve
--resume`` is started on it with a Mosquitto that goes on running, killed with SIGKILL once it has announced the round,
and started again; a time runs from the kill to the announcement at a subscriber; beside it stands the processor time of
the new process. The first start does not count: it reads the programs from the disk.

``benchmarks.fleet`` does the same with a fleet that takes part.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import tempfile
import time
from pathlib import Path

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import SqliteJournal
from fedzo.edge_runtime.connection.transport import Arrived, MqttTransport, TransportEvent
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.documents import Announcement, ServerPresence, parse
from fedzo.protocol.wire.signed import detach
from fedzo.protocol.wire.topics import Channel, topic

from .fleet.server import ServerProcess
from .long_journal import write_journal
from .report import Report

SPARE_ROUNDS = 1000
TIMEOUT_S = 120.0


def make_run(folder: Path, devices: int, rounds: int, k: int) -> RunFolder:
    """A run folder with a long journal.

    Args:
        folder: Empty; the artifact and the run lie in it afterwards.
        devices: Enrolled devices.
        rounds: Closed rounds; of the next one half of the reports are there.
        k: Directions.
    """
    export_artifact("lenet5", (1, 32, 32), 10, 0.8, 1, folder / "artifact")
    training = TrainingSettings(rounds=rounds + SPARE_ROUNDS, k=k, assignment="shared", learning_rate=1e-3)
    settings = RunSettings(
        saliency=SaliencySettings(method="random"),
        training=training,
        devices=devices,
        quorum=devices,
        evaluate_every=0,
        deadline_s=3600.0,
    )
    run = RunFolder.create(folder / "runs", folder / "artifact", name="long")
    names = [f"board-{number:05d}" for number in range(devices)]
    with SqliteJournal(run.journal_path) as journal:
        write_journal(journal, run.document(settings), run.artifact.manifest, names, rounds, open_share=0.5)
    return run


def measure(devices: int, rounds: int, k: int, repeats: int) -> Report:
    """Write a journal, then kill and start a server on it several times."""
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        run = make_run(Path(name), devices, rounds, k)
        written_s, size = time.monotonic() - began, run.journal_path.stat().st_size
        times = recoveries(run, Path(name) / "server.log", rounds + 1, repeats)
    rows = [{"devices": devices, "rounds": rounds, "recovery_s": wall_s, "cpu_s": cpu_s} for wall_s, cpu_s in times]
    figures = {
        "recovery_s_server": statistics.median(wall_s for wall_s, _ in times),
        "recovery_worst_s_server": max(wall_s for wall_s, _ in times),
        "recovery_cpu_s_server": statistics.median(cpu_s for _, cpu_s in times),
        "recovery_journal_mb": size / 1e6,
        "journal_bytes_per_report": size / ((rounds + 0.5) * devices),
    }
    asked = {"devices": devices, "rounds": rounds, "k": k, "repeats": repeats, "written_s": round(written_s, 1)}
    return Report(asked, rows, figures)


def recoveries(run: RunFolder, log: Path, round_: int, repeats: int) -> list[tuple[float, float]]:
    """Kill and start the server of a run.

    Args:
        run: Its folder.
        log: What the servers say.
        round_: The round that they announce.
        repeats: Kills that count.

    Returns:
        Of every kill the seconds to the announcement, and the processor seconds of the new process until then.
    """
    heard: queue.SimpleQueue[tuple[float, TransportEvent]] = queue.SimpleQueue()
    times = []
    with MosquittoBroker(port=0) as broker:
        (run.path / "serve.json").write_text(json.dumps({"broker": broker.url}))
        topics = [topic("default", Channel.SERVER), topic("default", Channel.HEAD)]
        subscriber = MqttTransport(
            broker.url, "subscriber", on_event=lambda e: heard.put((time.monotonic(), e)), subscriptions=topics
        )
        subscriber.connect()
        killed = time.monotonic()
        for repeat in range(repeats + 1):
            process = ServerProcess(["--resume", run.path], log)
            try:
                announced = _announced(heard, process, round_)
                cpu_s = process.cpu_s
            finally:
                process.kill()
            if repeat:
                times.append((announced - killed, cpu_s))
            killed = time.monotonic()
        subscriber.close()
    return times


def _announced(heard: queue.SimpleQueue[tuple[float, TransportEvent]], process: ServerProcess, round_: int) -> float:
    """When the round was announced after the server had said that it is there."""
    deadline, online = time.monotonic() + TIMEOUT_S, False
    while time.monotonic() < deadline:
        process.check()
        try:
            at, event = heard.get(timeout=0.5)
        except queue.Empty:
            continue
        if isinstance(event, Arrived) and event.topic == topic("default", Channel.SERVER):
            online = parse(ServerPresence, event.payload).online
        elif isinstance(event, Arrived) and online:
            document, *_ = detach(Channel.HEAD, event.payload)
            if parse(Announcement, document).round == round_:
                return at
    raise FedzoError(f"the server has announced nothing after {TIMEOUT_S:g} s")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--devices", type=int, default=1000, help="enrolled devices (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1000, help="rounds in the journal (default %(default)s)")
    parser.add_argument("--k", type=int, default=100, help="directions (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="kills that count (default %(default)s)")
    arguments = parser.parse_args()
    report = measure(arguments.devices, arguments.rounds, arguments.k, arguments.repeats)
    report.write(as_json=arguments.json)


if __name__ == "__main__":
    main()
