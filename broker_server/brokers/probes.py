"""What fedzo wants from a broker, tried one after the other; each probe yields findings and leaves nothing behind.

Everything happens below ``fedzo/v1/FEDERATION/d/PROBE/probe``, which no server and no device listens to.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from ...edge_runtime.connection.mqtt_types import ProtocolName, Will
from ...protocol.wire.blobs import BLOCK_BYTES
from ...protocol.wire.framing import MAX_PAYLOAD_BYTES
from .probe_client import Place, ProbeClient, ProbeLost, wait

__all__ = ["ALL_PROBES", "Finding", "Probes"]

ALL_PROBES: Final = ("QoS 1", "retained messages", "large messages", "will", "session", "keep-alive")
QUEUE_A_DEVICE: Final = 4  # reports and requests that may wait while the server is away
WINDOW: Final = 100  # what the server leaves unacknowledged
RETAINED: Final = 200
SUBSCRIPTIONS: Final = 40
QUIET_S: Final = 0.4  # nothing further comes after this
KEEPALIVE_S: Final = 2
SILENCE_S: Final = 12.0
_HEADER_BYTES: Final = 1024  # of topic and properties around a payload, at most
_SESSION_S: Final = 300


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: ``fail`` if fedzo cannot work so, ``warn`` if it works worse, ``skip`` if it could not be tried.
        detail: What was found.
        hint: The next action; may be empty.
    """

    name: str
    status: Literal["ok", "warn", "fail", "skip"]
    detail: str
    hint: str = ""


class Probes:
    """Probes with one login.

    Args:
        place: Broker and login.
        prefix: Topics of the federation, without the last slash.
        protocol: MQTT version that the broker speaks.
        devices: How many boards the broker should serve.
        own_ids: Whether clients of one login may have different ids; else there is one client at a time.
    """

    def __init__(
        self, place: Place, prefix: str, *, protocol: ProtocolName, devices: int, own_ids: bool = True
    ) -> None:
        self._place, self._protocol, self._devices, self._own_ids = place, protocol, devices, own_ids
        self._id = f"fedzo-probe-{secrets.token_hex(4)}"
        self._topics = f"{prefix}/d/{self._id}/probe"
        self._clients: list[ProbeClient] = []
        self._retained: list[str] = []
        self._sessions: list[str] = []
        self._silent: ProbeClient | None = None
        self._silent_since, self._silence = 0.0, f"{self._topics}/silence"

    def run(self, only: Sequence[str] = ALL_PROBES) -> Iterator[Finding]:
        """Yield findings; what was left in the broker is removed also when the caller stops early.

        Args:
            only: Names of probes, in the order of ``ALL_PROBES``.
        """
        steps: dict[str, Callable[[], Iterator[Finding]]] = {
            "QoS 1": self._qos_1,
            "retained messages": self._retained_messages,
            "large messages": self._large_messages,
            "will": self._will,
            "session": self._session,
            "keep-alive": self._keep_alive,
        }
        try:
            if self._own_ids and "keep-alive" in only:
                self._fall_silent()
            for name in only:
                if name == "keep-alive" and not self._own_ids:
                    self._fall_silent()
                yield from self._guarded(name, steps[name])
        finally:
            failure = self._sweep()
        if failure:
            yield Finding("cleaning up", "warn", failure, "remove by hand what is left")

    def _guarded(self, name: str, step: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        needed = name in ("QoS 1", "retained messages", "large messages")
        try:
            yield from step()
        except ProbeLost as lost:
            yield Finding(name, "fail" if needed else "warn", str(lost), _HINTS[name])
        finally:
            while self._clients:
                self._clients.pop().leave()

    def _client(
        self,
        role: str,
        *,
        clean: bool = True,
        expiry_s: int = 0,
        will: Will | None = None,
        keepalive_s: int = 60,
        manual_ack: bool = False,
    ) -> ProbeClient:
        client = ProbeClient(
            self._place, f"{self._id}-{role}", protocol=self._protocol, clean=clean, expiry_s=expiry_s, will=will,
            keepalive_s=keepalive_s, manual_ack=manual_ack,
        )  # fmt: skip
        self._clients.append(client)
        if expiry_s and client.client_id not in self._sessions:
            self._sessions.append(client.client_id)
        return client

    def _pair(self) -> tuple[ProbeClient, ProbeClient]:
        """A client that listens and one that speaks; the same one where a login has one client id."""
        listener = self._client("listener")
        return listener, self._client("speaker") if self._own_ids else listener

    # --- the probes -------------------------------------------------------------------------------------------------

    def _qos_1(self) -> Iterator[Finding]:
        listener, speaker = self._pair()
        granted = listener.subscribe([f"{self._topics}/echo"])[0]
        if granted != 1:
            how = f"QoS {granted}" if granted < 128 else f"refused (reason code {granted})"
            yield Finding("QoS 1", "fail", f"a subscription at QoS 1 was granted as {how}", _HINTS["QoS 1"])
            return
        took = []
        for number in range(20):
            before = time.monotonic()
            refusal = speaker.publish([(f"{self._topics}/echo", b"%d" % number)], others=[listener])[0]
            took.append(1e3 * (time.monotonic() - before))
            if refusal is not None:
                yield Finding("QoS 1", "fail", f"a publish was refused: {refusal}", _HINTS["QoS 1"])
                return
        wait([listener], lambda: len(listener.arrived) >= 20, self._place.timeout_s)
        wait([listener], lambda: False, QUIET_S)
        got = [(message.qos, message.payload) for message in listener.arrived]
        if got != [(1, b"%d" % number) for number in range(20)]:
            times = f"{len(got)} of 20 came, {sum(qos == 1 for qos, _ in got)} of them at QoS 1, or out of order"
            yield Finding("QoS 1", "fail", times, _HINTS["QoS 1"])
            return
        yield Finding("QoS 1", "ok", f"20 of 20 once and in order, PUBACK after {statistics.median(took):.1f} ms")

    def _retained_messages(self) -> Iterator[Finding]:
        speaker = self._client("speaker")
        if speaker.limits.get("RetainAvailable") == 0:
            detail = "the broker announces that it retains nothing"
            yield Finding("retained messages", "fail", detail, _HINTS["retained messages"])
            return
        names = [f"{self._topics}/{number}/state" for number in range(RETAINED)]
        self._retained += names
        refusal = next(filter(None, speaker.publish([(name, b"kept") for name in names], retain=True)), None)
        if refusal is not None:
            yield Finding("retained messages", "fail", f"refused: {refusal}", _HINTS["retained messages"])
            return
        speaker.leave()
        count = 0
        for start in range(0, RETAINED, SUBSCRIPTIONS):  # AWS IoT Core allows 50 a connection
            late = self._client("late")
            late.subscribe(names[start : start + SUBSCRIPTIONS])
            count += self._count_retained(late, names[start : start + SUBSCRIPTIONS])
            late.leave()
        if count < RETAINED:
            detail = f"a late client got {count} of {RETAINED} that it asked for by name"
            yield Finding("retained messages", "fail" if count < 3 else "warn", detail, _HINTS["retained messages"])
        else:
            yield Finding("retained messages", "ok", f"a late client got {count} of {RETAINED} by name")
        later = self._client("later")
        later.subscribe([f"{self._topics}/+/state"])
        count = self._count_retained(later, names)
        how = f"{count} of {RETAINED} by a wildcard"
        yield Finding("retained, wildcard", "ok", how if count else "not by a wildcard; fedzo does not need it")
        later.leave()
        self._clear_retained()
        last = self._client("last")
        last.subscribe(names[:SUBSCRIPTIONS])
        left = self._count_retained(last, names[:SUBSCRIPTIONS], at_most_s=QUIET_S)
        if left:
            yield Finding(
                "retained, removed", "warn", f"{left} of {SUBSCRIPTIONS} came after they had been removed", ""
            )

    def _count_retained(self, client: ProbeClient, names: list[str], *, at_most_s: float = 1.5) -> int:
        wait([client], lambda: len(client.arrived) >= len(names), at_most_s)
        wanted = set(names)
        return len({message.topic for message in client.arrived if message.retain} & wanted)

    def _large_messages(self) -> Iterator[Finding]:
        for what, size in (("block", BLOCK_BYTES + 64), ("message", MAX_PAYLOAD_BYTES)):
            listener, speaker = self._pair()
            limit = speaker.limits.get("MaximumPacketSize")
            listener.subscribe([f"{self._topics}/large"])
            status: Literal["warn", "fail"] = "fail" if what == "block" else "warn"
            if limit is not None and size + _HEADER_BYTES > limit:
                detail = f"the broker announces {limit} bytes a packet; the largest {what} has {size}"
                yield Finding("large messages", status, detail, _HINTS["large messages"])
                return
            payload = secrets.token_bytes(size)
            try:
                refusal = speaker.publish([(f"{self._topics}/large", payload)], others=[listener])[0]
            except ProbeLost as lost:
                refusal = str(lost)
            if refusal is None and not wait([listener], lambda: bool(listener.arrived), self._place.timeout_s):  # noqa: B023
                refusal = "it did not arrive"
            if refusal is not None or listener.arrived[0].payload != payload:
                detail = f"a {what} of {size} bytes: {refusal or 'another one arrived'}"
                yield Finding("large messages", status, detail, _HINTS["large messages"])
                return
            listener.leave()
            speaker.leave()
        yield Finding("large messages", "ok", f"{MAX_PAYLOAD_BYTES} bytes arrived")

    def _will(self) -> Iterator[Finding]:
        name = f"{self._topics}/will"
        self._retained.append(name)
        device = self._client("device", will=Will(name, b"lost"))
        device.cut()
        yield self._await_will("will", name, "{:.1f} s after a cut link", time.monotonic(), self._place.timeout_s / 2)

    def _keep_alive(self) -> Iterator[Finding]:
        """Silence takes longest (Mosquitto looks every five seconds), so it began before the other probes."""
        silent = self._silent
        if silent is None:
            yield Finding("keep-alive", "warn", "no client to be silent", _HINTS["keep-alive"])
            return
        granted = silent.limits.get("ServerKeepAlive", KEEPALIVE_S)
        if granted != KEEPALIVE_S:
            detail = f"the broker sets {granted} s instead of the {KEEPALIVE_S} s that a client asked for"
            yield Finding("keep-alive", "warn", detail, _HINTS["keep-alive"])
            return
        if not self._own_ids:  # A second client would end the silence.
            time.sleep(max(0.0, self._silent_since + SILENCE_S - time.monotonic()))
        left_s = max(1.0, self._silent_since + SILENCE_S - time.monotonic())
        found = f"given up, and its will there, {{:.1f}} s after the last word at a keep-alive of {KEEPALIVE_S} s"
        yield self._await_will("keep-alive", self._silence, found, self._silent_since, left_s)

    def _fall_silent(self) -> None:
        self._silent_since = time.monotonic()
        with contextlib.suppress(ProbeLost):
            self._silent = self._client("silent", will=Will(self._silence, b"lost"), keepalive_s=KEEPALIVE_S)
            self._clients.remove(self._silent)
            self._retained.append(self._silence)

    def _await_will(self, what: str, name: str, found: str, since: float, timeout_s: float) -> Finding:
        heir = self._client("heir")
        heir.subscribe([name])
        if not wait([heir], lambda: bool(heir.arrived), timeout_s):
            return Finding(what, "warn", f"no will within {timeout_s:g} s", _HINTS[what])
        return Finding(what, "ok", found.format(time.monotonic() - since))

    def _session(self) -> Iterator[Finding]:
        if not self._own_ids:
            detail = "client ids follow the login here; with a second login they could be tried"
            yield Finding("session", "skip", detail)
            return
        wanted = max(2 * WINDOW, QUEUE_A_DEVICE * self._devices)
        server = self._client("server", expiry_s=_SESSION_S)
        server.subscribe([f"{self._topics}/+/report"])
        server.leave()
        speaker = self._client("speaker")
        speaker.publish([(f"{self._topics}/{number}/report", b"%d" % number) for number in range(wanted)])

        server = self._client("server", clean=False, expiry_s=_SESSION_S, manual_ack=True)
        if not server.session_present:
            detail = "forgotten between two connections: what devices send while the server is away waits in them"
            yield Finding("session", "warn", detail, _HINTS["session"])
            return
        yield Finding("session", "ok", "kept between two connections")
        self._until_quiet(server)
        held = [bytes(message.payload) for message in server.arrived]
        window = len(held)
        server.cut()  # nothing was acknowledged

        server = self._client("server", clean=False, expiry_s=_SESSION_S, manual_ack=True)
        self._until_quiet(server)
        again = server.arrived[: len(held)]
        missing = len(set(held) - {message.payload for message in server.arrived})
        if missing:
            detail = f"{missing} of {window} messages that nobody acknowledged were not sent again"
            yield Finding("redelivery", "warn", detail, _HINTS["redelivery"])
        else:
            flagged = sum(message.dup for message in again)
            yield Finding("redelivery", "ok", f"{window} unacknowledged messages came again, {flagged} marked as such")
        if window < min(WINDOW, wanted):
            detail = f"at most {window} unacknowledged messages at a time; the server takes {WINDOW}"
            yield Finding("window", "warn", detail, _HINTS["window"])
        else:
            yield Finding("window", "ok", f"{window} unacknowledged messages at a time")
        yield self._drain(server, held, wanted)

    def _drain(self, server: ProbeClient, held: list[bytes], wanted: int) -> Finding:
        """Acknowledge all that waits, and compare with what was sent; what was ``held`` before had waited too."""
        taken: list[bytes] = []
        while server.arrived and server.loss is None:
            server.acknowledge()
            taken += [bytes(message.payload) for message in server.arrived]
            server.arrived.clear()
            wait([server], lambda: bool(server.arrived), QUIET_S)
        different = len(set(taken))
        waited = len({*taken, *held})
        if waited < wanted:
            detail = f"{waited} of {wanted} messages waited for a client that was away; the others are lost"
            return Finding("queue", "warn", detail, _HINTS["queue"].format(wanted=wanted, devices=self._devices))
        twice = len(taken) - different
        order = "in order" if taken == sorted(taken, key=int) else "in another order"
        more = f", {twice} twice" if twice else ""
        return Finding("queue", "ok", f"{wanted} messages waited for a client that was away, {order}{more}")

    def _until_quiet(self, client: ProbeClient) -> None:
        seen = -1
        while client.loss is None and len(client.arrived) != seen:
            seen = len(client.arrived)
            wait([client], partial(_has_more, client, seen + 50), QUIET_S)

    # --- leaving nothing behind -------------------------------------------------------------------------------------

    def _clear_retained(self, *, over: bool = False) -> None:
        kept = [] if over else [name for name in self._retained if name == self._silence]  # its will may be yet to come
        gone = [name for name in self._retained if name not in kept]
        if gone:
            speaker = self._client("broom")
            speaker.publish([(name, b"") for name in gone], retain=True)
            speaker.leave()
            self._retained = kept

    def _sweep(self) -> str:
        """Clean, and say what could not be cleaned."""
        if self._silent is not None:
            self._silent.leave()  # or its will would come after the cleaning
        try:
            self._clean()
        except ProbeLost as lost:
            left = [f"retained messages below {self._topics}"] * bool(self._retained)
            return f"{lost}; left behind: {', '.join(left + self._sessions)}"
        return ""

    def _clean(self) -> None:
        try:
            self._clear_retained(over=True)
            while self._sessions:
                role = self._sessions[-1].removeprefix(f"{self._id}-")
                self._client(role).leave()
                self._sessions.pop()
        finally:
            while self._clients:
                self._clients.pop().leave()


def _has_more(client: ProbeClient, count: int) -> bool:
    return len(client.arrived) > count


_HINTS: Final = {
    "QoS 1": "allow QoS 1, and let this login read and write below the federation's topics",
    "retained messages": "switch retained messages on; boards learn of the run from them",
    "large messages": "raise the limit: max_packet_size in Mosquitto, mqtt.max_packet_size in EMQX",
    "will": "without wills a dead board is noticed only at a round's deadline: keep --deadline short",
    "keep-alive": "without it a silent board is noticed only at a round's deadline: keep --deadline short",
    "session": "allow sessions to outlive a connection; boards send again in any case, only later",
    "redelivery": "boards send again what the server did not confirm, only later",
    "window": "raise it: max_inflight_messages in Mosquitto, mqtt.max_inflight in EMQX, mqtt.prefetch in RabbitMQ",
    "queue": "for {devices} boards let {wanted} messages wait: max_queued_messages in Mosquitto, "
    "mqtt.max_mqueue_len in EMQX",
}
