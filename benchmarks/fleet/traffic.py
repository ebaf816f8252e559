"""Bytes of a round, for a real device and for one that sends weights, packet by packet."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.broker_server.journal import SqliteJournal
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.wire.documents import Announcement, parse

from ..device_run import write_samples
from .rounds import RUN, serve_options
from .server import ServerProcess, free_port
from .wire import Cable, Capture, Packet

__all__ = ["Bytes", "measure_device", "measure_weights"]

DEVICE_TIMEOUT_S = 1200
_SKIPPED = 2
"""Rounds at the beginning that do not count: TCP acknowledges at once for a while after a connection is made."""


@dataclass(frozen=True)
class Bytes:
    """What one device and one round cost, on average over rounds.

    Attributes:
        up: Bytes at IP level from the device.
        down: To the device.
        packets_up: Packets of these bytes.
        packets_down: Likewise.
        carried_up: Bytes of MQTT alone.
        carried_down: Likewise.
        rounds: Averaged over.
    """

    up: float
    down: float
    packets_up: float
    packets_down: float
    carried_up: float
    carried_down: float
    rounds: int

    @classmethod
    def of(cls, packets: Sequence[Packet], rounds: int) -> Bytes:
        """Means over rounds."""

        def mean(values: Sequence[int]) -> float:
            return sum(values) / rounds

        up, down = [p for p in packets if p.up], [p for p in packets if not p.up]
        return cls(
            mean([p.size for p in up]), mean([p.size for p in down]), len(up) / rounds, len(down) / rounds,
            mean([p.carried for p in up]), mean([p.carried for p in down]), rounds,
        )  # fmt: skip

    def row(self) -> dict[str, float]:
        """All of it, by name."""
        return dataclasses.asdict(self)


def measure_device(artifact: Path, folder: Path, k: int, rounds: int, batch: int) -> Bytes:
    """A real device behind a cable of its own, with a real server: packets from one announcement to a later one.

    Raises:
        FedzoError: The run did not go as it should.
    """
    port, shape = free_port(), load_artifact(artifact).manifest.input_shape
    data = write_samples(folder / "samples.npz", shape)
    wanted = _SKIPPED + rounds
    options = serve_options(artifact, folder, 1, k, rounds=wanted + 1, port=port, batch=batch)
    with ExitStack() as stack:
        cable = stack.enter_context(Cable())
        server = ServerProcess([*options, "--host", cable.address], folder / "server.log")
        stack.callback(server.close)
        server.await_port(port, host=cable.address)
        capture = stack.enter_context(Capture(cable.interface, port))
        join = [sys.executable, "-m", "fedzo.edge_runtime", "join", f"mqtt://{cable.address}:{port}", "--data", data]
        join += ["--id", "board-00000", "--state", folder / "state", "--json"]
        device = subprocess.run(
            cable.command(join),
            capture_output=True,
            text=True,
            timeout=DEVICE_TIMEOUT_S,
            check=False,
            env=dict(os.environ),
        )
    if device.returncode:
        raise FedzoError(f"the device ended with {device.returncode}: {device.stderr[-1000:]}")
    with SqliteJournal(folder / "runs" / RUN / "journal.sqlite", read_only=True) as journal:
        heads = [e for _, e in journal.read({"announce"}) if parse(Announcement, e.payload).phase == "train"]
    first, last = heads[_SKIPPED].at, heads[wanted].at
    return Bytes.of(list(capture.between(first, last)), rounds)


def measure_weights(size: int, rounds: int) -> Bytes:
    """A device that sends all weights as float32 and gets the average, in one message each, over the same broker.

    Args:
        size: Weights.
        rounds: To average over.

    Raises:
        FedzoError: It did not end well.
    """
    with ExitStack() as stack:
        cable = stack.enter_context(Cable())
        # All weights in one message, as brokers for them are set; fedzo's own takes no packets of that size.
        broker = MosquittoBroker(cable.address, 0, max_packet_bytes=8 << 20)
        stack.enter_context(broker)
        peers = [sys.executable, "-m", "benchmarks.fleet.weights", broker.url, str(size), str(rounds)]
        server = subprocess.Popen([*peers, "server"], stdout=subprocess.PIPE, text=True)
        stack.callback(server.kill)
        assert server.stdout is not None
        server.stdout.readline()  # it listens
        capture = stack.enter_context(Capture(cable.interface, broker.port))
        done = subprocess.run(
            cable.command([*peers, "device"]), capture_output=True, text=True, timeout=300, check=False
        )
    if done.returncode:
        raise FedzoError(f"the device ended with {done.returncode}: {done.stderr[-1000:]}")
    times: dict[str, Any] = json.loads(done.stdout)
    return Bytes.of(list(capture.between(times["first"], times["last"])), rounds)
