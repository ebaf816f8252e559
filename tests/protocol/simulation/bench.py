"""One device machine on a bench: a script plays server, store and engine, one event at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar

import numpy as np

from fedzo.protocol.device_side.device import Device
from fedzo.protocol.device_side.device_events import (
    BlobFound,
    Compute,
    Computed,
    Connected,
    DeviceCommand,
    DeviceEvent,
    FindBlob,
    Outcome,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Received,
    Send,
    StoreBlob,
    Task,
    Tick,
)
from fedzo.protocol.device_side.parts import start_replica
from fedzo.protocol.perturbation.directions import round_coefficients
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.codec import BinaryMessage
from fedzo.protocol.wire.documents import (
    Announcement,
    Document,
    Hello,
    Order,
    Phase,
    Presence,
    RunDocument,
    pack_participants,
)
from fedzo.protocol.wire.messages import Report, UpdateRecord
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest
from tests.protocol.builders import seeded_normals
from tests.protocol.simulation.fakes import (
    cut_graphs,
    cut_manifest,
    fake_graphs,
    manifest_for,
    run_document,
    tiny_manifest,
)

RETRY_S = 5.0
SESSION = 7
SETTINGS = RunSettings(
    seed=4,
    sparsity=0.0,
    saliency=SaliencySettings(samples=8),
    training=TrainingSettings(rounds=20, k=3),
    devices=3,
    quorum=2,
)
_MANIFESTS = {"manifest": tiny_manifest().encode(), "cut manifest": cut_manifest().encode()}
NAMES = {hashlib.sha256(data).digest(): n for n, data in (_MANIFESTS | fake_graphs() | cut_graphs()).items()}
FILES = dict(zip(NAMES, (_MANIFESTS | fake_graphs() | cut_graphs()).values(), strict=True))
_Command = TypeVar("_Command")


def change_settings(**changes: Any) -> RunSettings:
    """The bench's settings with changes."""
    return dataclasses.replace(SETTINGS, **changes)


def hello(session: int = SESSION) -> Hello:
    """An introduction."""
    return Hello(session, "bench", 64.0, 10, 2, "none", "none")


class Bench:
    """Drives one device.

    Args:
        outbox: What an earlier session left.
        kept: Blobs in the local store; all of the run's files by default.
        settings: Of the run.

    Attributes:
        device: The machine.
        now: What the clock shows.
        out: Commands of the last event, and of the answers to it that the bench gave on its own.
        log: Update records that the server has made.
        server: The server's replica.
    """

    def __init__(
        self,
        *,
        outbox: tuple[str, Report] | None = None,
        kept: dict[bytes, bytes] | None = None,
        settings: RunSettings = SETTINGS,
    ) -> None:
        self.run = run_document(settings)
        self.store = dict(FILES if kept is None else kept)
        self.now = 100.0
        self.device = Device(hello(), outbox=outbox, retry_s=RETRY_S)
        self.out: list[DeviceCommand] = []
        self.follow(Mask.dense(tiny_manifest().layout))

    def follow(self, mask: Mask) -> None:
        """The server starts a log from this mask."""
        self.mask, self.log = mask, list[UpdateRecord]()
        manifest = manifest_for(self.run.training.estimator)
        self.server = start_replica(self.run, manifest, mask)

    # --- events ---------------------------------------------------------------------------------------------------

    def give(self, *events: DeviceEvent) -> list[DeviceCommand]:
        """Give events; the local store answers at once."""
        self.out = []
        waiting = list(events)
        while waiting:
            commands = self.device.on(waiting.pop(0), self.now)
            self.out += commands
            wakeup = self.device.wakeup
            assert wakeup is None or wakeup > self.now
            for command in commands:
                if isinstance(command, FindBlob):
                    data = self.store.get(command.sha256)
                    waiting.append(BlobFound(command.sha256, data is not None, data if data and command.read else b""))
                elif isinstance(command, StoreBlob):
                    self.store[command.sha256] = command.data
                    waiting.append(BlobFound(command.sha256, True, command.data if command.read else b""))
        return self.out

    def hear(self, channel: Channel, *messages: Document | BinaryMessage) -> list[DeviceCommand]:
        """Messages from the server."""
        return self.give(*(Received(channel, message) for message in messages))

    def wait(self, seconds: float) -> list[DeviceCommand]:
        """Let time pass, with a Tick whenever one is due; gives all commands."""
        found, end = [], self.now + seconds
        while (wakeup := self.device.wakeup) is not None and wakeup <= end:
            self.now = wakeup
            found += self.give(Tick())
        self.now = end
        self.out = found + self.give(Tick())
        return self.out

    # --- on the way to a round ------------------------------------------------------------------------------------

    def connect(self) -> Bench:
        """The link comes up."""
        self.give(Connected())
        return self

    def join(self) -> Bench:
        """The run is known, and the device welcome as number 1."""
        self.connect()
        self.hear(Channel.RUN, self.run)
        self.welcome()
        return self

    def welcome(self, **changes: Any) -> list[DeviceCommand]:
        """The server's welcome."""
        fields: dict[str, Any] = {"run": self.run.run, "action": "welcome", "session": SESSION, "ordinal": 1} | changes
        return self.hear(Channel.COMMAND, Order(**fields))

    def plan(self) -> Bench:
        """The run fits, and every file is there."""
        self.join()
        self.only(Plan)
        self.give(Planned(self.run.run, 12.5, 8))
        return self

    def head(self, phase: Phase = "train", round_: int = 1, **changes: Any) -> Announcement:
        """The announcement of a round of devices 0 to 2 at the end of the log."""
        fields: dict[str, Any] = {"participants": pack_participants(np.arange(3))}
        if self.mask.sparsity:
            data = self.mask.encode()
            fields |= {"mask_sha256": hashlib.sha256(data).hexdigest(), "mask_size": len(data)}
        if phase not in ("saliency", "enrol"):
            fields |= {
                "log_length": self.server.index,
                "log_head": self.server.head.hex(),
                "weights_digest": self.server.digest.hex(),
            }
        return Announcement(self.run.run, round_, phase, **(fields | changes))

    def announce(self, phase: Phase = "train", round_: int = 1, **changes: Any) -> list[DeviceCommand]:
        """Announce a round; an engine is opened at once if one is asked for."""
        self.hear(Channel.HEAD, self.head(phase, round_, **changes))
        self.prepare()
        return self.out

    def prepare(self) -> None:
        """Open the engine if one is asked for."""
        for command in [c for c in self.out if isinstance(c, Prepare)]:
            before = self.out
            self.out = before + self.give(Prepared(command.run.run, command.mask_sha256))

    def compute(self, phase: Phase = "train", round_: int = 1) -> Task:
        """Ready, and at work in a round."""
        if self.device.stage == "offline":
            self.plan()
        self.announce(phase, round_)
        return self.only(Compute).task

    def report(self, phase: Phase = "train", round_: int = 1) -> Report:
        """A report that waits for its receipt."""
        self.answer(self.compute(phase, round_))
        (report,) = self.sent(Report)
        return report

    def answer(self, task: Task, **changes: Any) -> list[DeviceCommand]:
        """The engine's answer to a task."""
        fields: dict[str, Any] = {"blocks": (np.ones(3, dtype=np.float32),), "samples": 5} | changes
        return self.give(Computed(task.number, Outcome(**fields)))

    # --- the server's log -----------------------------------------------------------------------------------------

    def update(self, round_: int) -> UpdateRecord:
        """The server makes an update."""
        index, values = self.server.index, seeded_normals(9, self.server.index, 4)
        coefficients = round_coefficients(values.astype(np.float64))
        self.log.append(self.server.prepare(index, round_, 0.125, ((4 * index, 4),), coefficients))
        return self.log[-1]

    # --- what came out --------------------------------------------------------------------------------------------

    def only(self, kind: type[_Command]) -> _Command:
        """The one command of this kind."""
        found = [command for command in self.out if isinstance(command, kind)]
        assert len(found) == 1, f"{len(found)} of {kind.__name__} in {self.out}"
        return found[0]

    def sent(self, kind: type[_Command]) -> list[_Command]:
        """Published messages of this kind."""
        return [c.message for c in self.out if isinstance(c, Send) and isinstance(c.message, kind)]

    def presence(self) -> Presence:
        """The last presence of the last commands."""
        return self.sent(Presence)[-1]

    def blocks(self) -> list[BlobBlock]:
        """What the server would answer to the requests of the last commands."""
        found = []
        for request in self.sent(BlobRequest):
            data = FILES.get(request.sha256) or self.mask.encode()
            part = data[request.offset : request.offset + request.length]
            found.append(BlobBlock(request.sha256, request.offset, len(data), part))
        return found


def other_run(bench: Bench, name: str = "run-2") -> RunDocument:
    """Another run over the same artifact."""
    return RunDocument(name, bench.run.manifest_sha256, bench.run.manifest_size, bench.run.settings)
