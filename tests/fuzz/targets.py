"""What hostile payloads are thrown at: a federation in virtual time, with the real intakes of server and board.

The federation of ``tests/protocol/simulation`` runs honest devices and a coordinator. Beside them are enrolled devices
that send hostile payloads, as a board that was taken over could, and a victim that hears hostile payloads after the
signature was checked, as from a server that was taken over. After every payload both machines must live, hold a bounded
amount of memory, and the honest devices must come to the end of the run with the coordinator's weights.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections import Counter, deque
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedzo.broker_server.intake import Drops, Intake
from fedzo.broker_server.security.signing import RunSigner
from fedzo.edge_runtime.connection.inbound import read_message
from fedzo.edge_runtime.connection.mqtt_types import Arrived
from fedzo.edge_runtime.storage.run_key import RunKey
from fedzo.protocol.device_side import device_events
from fedzo.protocol.device_side.device import Device
from fedzo.protocol.device_side.device_events import Outcome
from fedzo.protocol.errors import ArtifactError, FedzoError, ProtocolError
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.server_side.coordinator_events import DeviceSaid
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.documents import Hello, Presence
from fedzo.protocol.wire.messages import Decline
from fedzo.protocol.wire.signed import is_signed
from fedzo.protocol.wire.topics import FROM_DEVICE, Channel, device_subscriptions, parse_topic, topic
from tests.fuzz.mutations import mutate
from tests.protocol.simulation.network import FEDERATION
from tests.protocol.simulation.nodes import DeviceNode
from tests.protocol.simulation.world import World

__all__ = ["Federation"]

HONEST = 5
HOSTILE = ("evil-0", "evil-1")
VICTIM = "victim"
KEPT_PAYLOADS = 16
ROUNDS = 40
TURNS = 200  # a run takes some more of 0.2 s
SIGNED_EVERY = 250  # verifying takes as long as a hundred other payloads
SETTINGS = RunSettings(
    seed=4,
    sparsity=0.5,
    saliency=SaliencySettings(samples=8),
    training=TrainingSettings(rounds=ROUNDS, k=4, learning_rate=0.01, assignment="shared"),
    # Two of seven lie: a rule that bears it, else "diverged" is a right answer.
    aggregation=AggregationSettings("median", hostile=2),
    devices=HONEST,
    quorum=HONEST,
    deadline_s=5.0,
    patience=1_000,
    enrol_deadline_s=30.0,
    evaluate_every=10,
)


class _Victim(DeviceNode):
    """A device whose server lies. Its shell answers everything, as none of the promises of a server hold."""

    def handle(self, event: device_events.DeviceEvent) -> None:
        if not self.alive or self.machine is None:
            return
        for command in self.machine.on(event, self.clock):
            self._do(command)
        if self.machine.finished:  # It was told to go, or could not go on; an operator starts it again.
            assert self.error is None or isinstance(self.error, FedzoError)
            self.world.left[type(self.error).__name__] += 1  # type: ignore[attr-defined]  # of the Federation
            self.blobs.clear()
            self.session += 1
            hello = Hello(self.session, "tests", 64.0, 12, 12, "none", "none")
            self.machine = Device(hello, retry_s=1.0)
            self.machine.on(device_events.Connected(), self.clock)
        self.sleep()

    def sleep(self) -> None:
        """Ticks are given by the federation: a wakeup may lie in the past here."""

    def _do(self, command: device_events.DeviceCommand) -> None:
        if isinstance(command, device_events.Plan):
            planned = device_events.Planned(command.run.run, 12.5, min(8, command.micro_batch or 8), ())
            self.later(0.0, functools.partial(self.handle, planned))
        elif isinstance(command, device_events.Prepare):
            prepared = device_events.Prepared(command.run.run, command.mask_sha256)
            self.later(0.0, functools.partial(self.handle, prepared))
        elif isinstance(command, device_events.Compute):
            assert all(part.dtype.name == "int64" for part in command.task.positions)
            declined = Outcome((), 0, decline=Decline.FAILED, detail="not for you")
            self.later(0.0, functools.partial(self.handle, device_events.Computed(command.task.number, declined)))
        elif isinstance(command, device_events.Cancel):
            return
        else:
            super()._do(command)


class Federation(World):
    """One run under fire.

    Args:
        seed: Of everything.
        counts: Is added to: what happened to payloads.

    Attributes:
        left: Why the victim left, by error.
    """

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        super().__init__(SETTINGS, HONEST, seed=seed)
        self.counts, self.left = counts, Counter[str]()
        self.server.trace = deque(maxlen=100)  # type: ignore[assignment]  # nobody looks at all of it here
        self.victim = _Victim(self, VICTIM)
        self.drops = Drops()
        self._intake = Intake(FEDERATION, self.drops)
        self._good: dict[str, deque[bytes]] = {}
        self._source = random.Random(seed)
        self._signer = RunSigner(Ed25519PrivateKey.from_private_bytes(bytes(32)))
        self._pins = tempfile.TemporaryDirectory()
        self._key = RunKey(Path(self._pins.name) / "run-key", FEDERATION, VICTIM, 1, given=self._signer.public_key)

    def nodes(self) -> list[Any]:
        return [*super().nodes(), self.victim]

    def start(self) -> Federation:
        super().start()
        self.victim.start()
        for name in HOSTILE:
            hello = Hello(1, "evil", 64.0, 12, 12, "none", "none").encode()
            self.later(1.0, functools.partial(self.to_server, topic(FEDERATION, Channel.HELLO, name), hello))
        arrive = self.broker._arrive

        def watched(text: str, payload: bytes) -> None:
            self._good.setdefault(text, deque(maxlen=KEPT_PAYLOADS)).append(payload)
            arrive(text, payload)

        self.broker._arrive = watched  # type: ignore[method-assign]
        return self

    # --- payloads ---------------------------------------------------------------------------------------------------

    def hostile_payload(self) -> tuple[str, bytes]:
        """A topic and what somebody hostile would send there now."""
        source = self._source
        topics = list(self._good)
        text = source.choice(topics)
        payload = mutate(source.choice(self._good[text]), source, source.choice(self._good[source.choice(topics)]))
        place = parse_topic(text)
        if place.channel in FROM_DEVICE:
            # Under the own id, as the broker sees to it; sometimes on another channel, or with an id made up.
            name = source.choice(HOSTILE) if source.random() < 0.97 else f"x{source.randrange(2_000)}"
            channel = place.channel if source.random() < 0.9 else source.choice(FROM_DEVICE)
            return topic(FEDERATION, channel, name), payload
        subscribed = device_subscriptions(FEDERATION, VICTIM)
        own = text.replace(f"/{place.device}/", f"/{VICTIM}/") if place.device else text
        return (own if source.random() < 0.9 else source.choice(subscribed)), payload

    def pretend(self) -> None:
        """Hostile devices come back as ready ones whatever became of them, so that their reports are looked at."""
        for name in HOSTILE:
            member = self.server.coordinator.roster.get(name)
            ready = Presence(member.session if member else 1, "ready", self.server.run.run)
            self.to_server(topic(FEDERATION, Channel.STATE, name), ready.encode())

    def throw(self, text: str, payload: bytes) -> None:
        """One payload at whom it is addressed to; whatever is raised here is a bug."""
        self.counts["payloads"] += 1
        if parse_topic(text).channel in FROM_DEVICE:
            self.to_server(text, payload)
        else:
            if self.counts["payloads"] % SIGNED_EVERY == 0:
                self.to_key(text, payload)
            self.to_victim(text, payload)

    def to_key(self, text: str, payload: bytes) -> None:
        """As the broker could change it: what was signed is not what comes, and never gets through."""
        place = parse_topic(text)
        good = self._good.get(text, self._good[topic(FEDERATION, Channel.RUN)])[-1]
        signed = self._signer.sign(FEDERATION, place.channel, place.device, good)
        changed = payload + signed[len(good) :]
        try:
            opened = self._key.open(Arrived(text, changed, False, None))
        except (ProtocolError, ArtifactError):
            self.counts["to the board, not signed"] += 1
            return
        assert opened in (good, None) or not is_signed(place.channel), (text, changed)

    def to_server(self, text: str, payload: bytes) -> None:
        """Through the server's intake into the coordinator."""
        event = self._intake.event(Arrived(text, payload, False, None))
        understood = isinstance(event, DeviceSaid)
        self.counts["to the server, understood" if understood else "to the server, dropped"] += 1
        if event is not None:
            self.server.handle(event)

    def to_victim(self, text: str, payload: bytes) -> None:
        """Through the board's intake into its machine."""
        try:
            received = read_message(FEDERATION, VICTIM, text, payload)
        except ProtocolError:
            self.counts["to the board, dropped"] += 1
            return
        self.counts["to the board, understood"] += 1
        self.victim.handle(received)
        if self.victim.machine is not None and self._source.random() < 0.1:
            self.victim.handle(device_events.Tick())

    # --- a run ------------------------------------------------------------------------------------------------------

    def under_fire(self, payloads: int) -> None:
        """Run to the end of the honest devices, with so many payloads on the way.

        Raises:
            AssertionError: The run did not end as it should.
        """
        self.start()
        self.pass_time(3.0)
        thrown = 0
        while not self.is_over():
            assert self.now < 100_000, self.describe()
            for _ in range(min(payloads - thrown, max(1, payloads // TURNS))):
                self.throw(*self.hostile_payload())
                thrown += 1
            self.pretend()
            self.pass_time(0.2 if thrown < payloads else 5.0)
        for _ in range(payloads - thrown):  # The run was too short for all of them: the rest hit what has ended.
            self.counts["after the end"] += 1
            self.throw(*self.hostile_payload())
        assert self.server.error is None, self.server.error
        digests = {
            node.machine.replica.digest for node in self.devices.values() if node.machine and node.machine.replica
        }
        assert digests == {self.server.coordinator.replica.digest}
        assert self.server.coordinator.replica.index == ROUNDS
        self._pins.cleanup()
        self.counts["runs"] += 1
        self.counts["updates"] += ROUNDS
        self.counts["reports of hostile devices that counted"] += sum(
            kind == "report" and device in HOSTILE for kind, _, device, _ in self.server.journal
        )
        for name, number in self.left.items():
            self.counts[f"the board left: {name}"] += number
