"""A federation in small for tests: a LeNet-5 artifact, random data, and a server that does what the test says."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedzo.broker_server.security.signing import RunSigner
from fedzo.edge_runtime.agent import Agent, Connection
from fedzo.edge_runtime.connection.transport import Arrived, MqttTransport, TransportEvent
from fedzo.edge_runtime.datasets.data import Dataset, load_dataset
from fedzo.edge_runtime.storage.artifact import BlobStore, load_artifact
from fedzo.edge_runtime.storage.state import DeviceState
from fedzo.edge_runtime.worker import Limits
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import (
    Announcement,
    Document,
    Hello,
    Order,
    Presence,
    RunDocument,
    ServerPresence,
    pack_participants,
    parse,
)
from fedzo.protocol.wire.messages import Receipt, Report, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import RETAINED, Channel, parse_topic, server_subscriptions, topic
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest, LogSlice

INPUT_SHAPE = (1, 28, 28)
N_CLASSES = 10
SAMPLES = 50
FEDERATION = "default"

_T = TypeVar("_T")


def export_lenet(folder: Path, sparsity: float = 0.8) -> Path:
    """A LeNet-5 artifact."""
    export_artifact("lenet5", INPUT_SHAPE, N_CLASSES, sparsity, 1, folder)
    return folder


def write_data(path: Path, samples: int = SAMPLES) -> Path:
    """Random images with random labels."""
    bits = np.random.Generator(np.random.PCG64(samples))
    images = bits.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
    np.savez(path, x=images, y=bits.integers(0, N_CLASSES, samples))
    return path


def run_document(artifact: Path, run: str = "run-1", **settings: Any) -> RunDocument:
    """The run of an artifact."""
    loaded = load_artifact(artifact)
    return RunDocument(run, loaded.digest.hex(), len(loaded.manifest_bytes), RunSettings(**settings))


def filled_store(folder: Path, artifact: Path) -> BlobStore:
    """A store that holds the whole artifact."""
    store = BlobStore(folder)
    for path in artifact.iterdir():
        store.put(path.read_bytes())
    return store


def loader(data: Path, holdout: float = 0.2) -> Callable[[tuple[int, ...], int], Dataset]:
    """What a worker loads its data with."""
    return lambda shape, classes: load_dataset(data, shape, classes, holdout=holdout)


SIGNER = RunSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


class FakeServer:
    """Answers what devices ask; announces, and acknowledges reports, when the test says so.

    Attributes:
        acknowledge: Whether reports get a receipt at once.
        run: The run of new devices.
        limit: Micro-batch that devices may use at most; 0 for no limit.
        lacks: Hashes of blobs that it does not have, with whether it says so.
    """

    def __init__(
        self, url: str, artifact: Path, run: RunDocument, password: str | None = None, *, signs: bool = False
    ) -> None:
        self.run, self._signs = run, signs
        self.acknowledge = True
        self.welcome = True
        self.limit = 0
        self.lacks: dict[bytes, bool] = {}
        self._blobs = {path: path.read_bytes() for path in artifact.iterdir()}
        self._by_hash = filled_store(artifact.parent / "server-blobs", artifact)
        self._log: list[UpdateRecord] = []
        self._said: queue.Queue[tuple[str, object, bytes]] = queue.Queue()
        self.heard: list[tuple[str, object, bytes]] = []
        self.problems: list[BaseException] = []
        self._ordinals: dict[str, int] = {}
        self._transport = MqttTransport(
            url,
            "fedzo-server",
            on_event=self._on_event,
            subscriptions=server_subscriptions(FEDERATION),
            username=None if password is None else "fedzo-server",
            password=password,
        )
        self._transport.connect(15.0)
        self.send(Channel.SERVER, ServerPresence(True, 1))
        self.send(Channel.RUN, run)

    def close(self) -> None:
        self._transport.close(timeout_s=1.0)
        assert self.problems == []

    def send(
        self, channel: Channel, message: Document | Receipt | LogSlice | BlobBlock | UpdateRecord, device: str = ""
    ) -> None:
        self.send_bytes(channel, message.encode(), device)

    def send_bytes(self, channel: Channel, payload: bytes, device: str = "", *, retain: bool | None = None) -> None:
        retain = channel in RETAINED if retain is None else retain
        if self._signs:
            payload = SIGNER.sign(FEDERATION, channel, device, payload)
        self._transport.publish(topic(FEDERATION, channel, device), payload, retain=retain)

    def announce(self, round_: int, phase: Any, *, ordinals: tuple[int, ...] = (0,), **fields: Any) -> Announcement:
        head = Announcement(
            self.run.run, round_, phase, pack_participants(np.array(ordinals, dtype=np.int64)), **fields
        )
        self.send(Channel.HEAD, head)
        return head

    def order(self, device: str, session: int) -> Order:
        """The welcome of a device."""
        ordinal = self._ordinals.setdefault(device, len(self._ordinals))
        return Order(self.run.run, "welcome", session, ordinal, micro_batch=self.limit)

    def offer(self, data: bytes) -> str:
        """Serve one more blob; its hash in hex."""
        return self._by_hash.put(data).name

    def append(self, record: UpdateRecord) -> None:
        """One more record of the log."""
        self._log.append(record)
        self.send(Channel.LOG, record)

    def expect(self, kind: type[_T], timeout_s: float = 60.0, **wanted: object) -> _T:
        """The next message of a kind whose fields are as wanted."""
        return self.expect_bytes(kind, timeout_s, **wanted)[0]

    def expect_bytes(self, kind: type[_T], timeout_s: float = 60.0, **wanted: object) -> tuple[_T, bytes]:
        """The same with its payload."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                entry = self._said.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                seen = [message for _, message, _ in self.heard]
                raise AssertionError(f"no {kind.__name__} {wanted} in {timeout_s} s; heard {seen[-8:]}") from None
            self.heard.append(entry)
            message = entry[1]
            if isinstance(message, kind) and all(getattr(message, name) == value for name, value in wanted.items()):
                return message, entry[2]

    def expect_device(self) -> str:
        """Who sent the last message that was expected."""
        return self.heard[-1][0]

    def nothing(self, kind: type, seconds: float) -> None:
        """No message of the kind comes in a while."""
        time.sleep(seconds)
        while not self._said.empty():
            entry = self._said.get()
            self.heard.append(entry)
            assert not isinstance(entry[1], kind), entry

    def _on_event(self, event: TransportEvent) -> None:
        if not isinstance(event, Arrived) or not event.payload:
            return
        try:
            place = parse_topic(event.topic)
            message: object
            if place.channel is Channel.HELLO:
                message = parse(Hello, event.payload)
            elif place.channel is Channel.STATE:
                message = parse(Presence, event.payload)
            else:
                message = decode(event.payload)
            self._said.put((place.device, message, event.payload))
            self._answer(place.device, message)
        except BaseException as error:
            self.problems.append(error)
            raise

    def _answer(self, device: str, message: object) -> None:
        if isinstance(message, Hello) and self.welcome:
            self.send(Channel.COMMAND, self.order(device, message.session), device)
        elif isinstance(message, BlobRequest) and message.sha256 in self.lacks:
            if self.lacks[message.sha256]:
                self.send(Channel.BLOCK, BlobBlock(message.sha256, 0, 0, b""), device)
        elif isinstance(message, BlobRequest):
            data = self._by_hash.get(message.sha256)
            part = data[message.offset : message.offset + message.length]
            self.send(Channel.BLOCK, BlobBlock(message.sha256, message.offset, len(data), part), device)
        elif isinstance(message, LogRequest):
            records = tuple(self._log[message.first : message.first + message.count])
            if records:
                self.send(Channel.BLOCK, LogSlice(message.first, records), device)
        elif isinstance(message, Report) and self.acknowledge:
            self.send(Channel.ACK, Receipt(message.run_tag, message.round, Verdict.ACCEPTED), device)


@dataclass
class RunningAgent:
    """An agent on a thread of this process."""

    agent: Agent
    state: DeviceState
    thread: threading.Thread
    lines: list[str]
    error: FedzoError | None = None

    def wait(self, timeout_s: float = 60.0) -> None:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), self.lines

    def stop(self) -> None:
        if self.thread.is_alive():
            self.agent.stop()
        self.wait()
        self.state.close()


def start_agent(
    url: str,
    folder: Path,
    data: Path,
    *,
    device: str = "dev-a",
    ram_budget_mib: float = 4096.0,
    retry_s: float = 0.5,
    holdout: float = 0.2,
    timeout_s: float | None = None,
) -> RunningAgent:
    """Start an agent; :meth:`RunningAgent.stop` ends it."""
    state = DeviceState(folder, federation=FEDERATION, device=device)
    hello = Hello(state.session, "test", ram_budget_mib, 40, 10, "", "x86_64")
    lines: list[str] = []
    agent = Agent(
        state,
        hello,
        loader(data, holdout),
        Connection(url, timeout_s=timeout_s),
        Limits(ram_budget_mib),
        retry_s=retry_s,
        say=lines.append,
    )
    running = RunningAgent(agent, state, threading.Thread(target=lambda: None), lines)

    def run() -> None:
        try:
            agent.run()
        except FedzoError as error:
            running.error = error

    running.thread = threading.Thread(target=run, name=f"agent-{device}", daemon=True)
    running.thread.start()
    return running


def quick(run: RunDocument, **training: Any) -> RunDocument:
    """The same run with other training settings."""
    settings = dataclasses.replace(run.settings, training=dataclasses.replace(run.settings.training, **training))
    return dataclasses.replace(run, settings=settings)
