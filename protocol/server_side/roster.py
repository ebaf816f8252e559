"""The devices of a run as the coordinator knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..wire.documents import Hello, Order, Presence, Status
from ..wire.messages import Decline, Report, ReportKind, Verdict
from ..wire.participants import unpack_participants

__all__ = ["MAX_DEVICES", "REPLACED", "Member", "Roster", "introduction", "refusal"]

MAX_DEVICES = 100_000
LEAST_MS = 0.5
"""What a report of 0 ms took: times are rounded, and a mean of many zeros would end below every float."""
FULL = "the run has all the devices it can take"
REPLACED = "a device with the same id has started later; give each an id of its own with --id"

_KEPT = (
    "session",
    "status",
    "refused_round",
    "counted_round",
    "declined_round",
    "query_ms",
    "weights_digest",
    "micro_batch",
    "micro_batch_limit",
)
"""What a snapshot keeps of a device."""


@dataclass
class Member:
    """One enrolled device.

    Attributes:
        name: Device id.
        ordinal: Its number in the run, from 0; -1 until the run starts (:meth:`Roster.number`).
        hello: Its latest introduction.
        status: Its latest presence.
        session: Boot counter of that presence.
        detail: One line for people.
        silent: It missed a deadline and has not been heard of since.
        refused_round: Last round in which its report was refused; -1 for none.
        garbled_round: Last round in which it sent what is no message; -1 for none.
        counted_round: Last round of which a report of it was accepted; -1 for none.
        declined_round: Last round of which one without scalars was accepted; -1 for none.
        query_ms: Time of one of its forward passes in training, smoothed over its reports; 0 if none has said.
        weights_digest: What it last said of its weights, hex.
        planned_peak_mib: What its memory plan says.
        micro_batch: Of its memory plan; 0 if it has not said.
        micro_batch_limit: What it was lowered to, as its plans did not hold; 0 once nothing is left to lower, None as
            long as they hold. A session begins without a limit: the board may have been given more memory.
    """

    name: str
    ordinal: int
    hello: Hello
    status: Status = "joining"
    session: int = 0
    detail: str = ""
    silent: bool = False
    refused_round: int = -1
    garbled_round: int = -1
    counted_round: int = -1
    declined_round: int = -1
    query_ms: float = 0.0
    weights_digest: str = ""
    planned_peak_mib: float = 0.0
    micro_batch: int = 0
    micro_batch_limit: int | None = None

    def welcome(self, run: str) -> Order:
        """What the device is told that it is, and may."""
        if self.is_excused:
            return Order(run, "excuse", self.session, detail=self.excuse)
        limit = self.micro_batch_limit or 0
        if self.ordinal < 0:
            return Order(run, "enrol", self.session, micro_batch=limit)
        return Order(run, "welcome", self.session, self.ordinal, micro_batch=limit)

    def take_hello(self, hello: Hello) -> None:
        """A device says hello when it starts, and when it starts over."""
        self.silent = False
        if hello.session > self.session:  # A repeated hello of the same session says nothing new.
            self.hello = hello
            self._start_session(hello.session)
            self.status = "joining"

    def take_presence(self, presence: Presence) -> None:
        """Old wills and old retained states have an older session and mean nothing."""
        if presence.session < self.session:
            return
        self._start_session(presence.session)
        self.status = presence.status
        self.detail = presence.detail
        self.silent = False
        if presence.weights_digest:
            self.weights_digest = presence.weights_digest
        if presence.planned_peak_mib:
            self.planned_peak_mib = presence.planned_peak_mib
        self.micro_batch = presence.micro_batch or self.micro_batch

    def take_report(self, report: Report) -> None:
        """Who reports is ready, even if its presence has not come since the server's start.

        One that says that its plan did not hold halves the device's micro-batch. That follows from the report alone,
        so repeated and restored ones change nothing.
        """
        self.silent = False
        self.counted_round = max(self.counted_round, report.round)
        if not report.blocks:
            self.declined_round = max(self.declined_round, report.round)
        if report.kind is ReportKind.PROBE and report.queries:
            took = max(report.elapsed_ms, LEAST_MS) / report.queries
            self.query_ms = (self.query_ms + took) / 2 if self.query_ms else took
        if report.session > self.session or (report.session == self.session and self.status == "joining"):
            self._start_session(report.session)
            self.status = "ready"
        if report.session != self.session:
            return  # Of a process that has ended; this one may have another budget.
        self.micro_batch = report.micro_batch or self.micro_batch
        if report.decline is Decline.OVER_BUDGET:
            half = report.micro_batch // 2
            self.micro_batch_limit = half if self.micro_batch_limit is None else min(half, self.micro_batch_limit)

    def verdict_again(self, report: Report) -> Verdict:
        """What one more report of a round is told: its scalars count nowhere where the first report had none."""
        return Verdict.LATE if report.blocks and report.round == self.declined_round else Verdict.DUPLICATE

    def _start_session(self, session: int) -> None:
        if session > self.session:
            self.session, self.micro_batch, self.micro_batch_limit = session, 0, None

    @property
    def is_ready(self) -> bool:
        """Whether a new round should count on it."""
        return self.status == "ready" and not self.silent and not self.is_over_limit

    @property
    def is_alive(self) -> bool:
        """Whether it may still be heard of soon."""
        return self.status in ("joining", "ready", "done") and not self.silent and not self.is_excused

    @property
    def is_over_limit(self) -> bool:
        """Whether it has to plan with a smaller micro-batch before it can compute."""
        return self.micro_batch_limit is not None and (self.is_excused or self.micro_batch > self.micro_batch_limit)

    @property
    def is_excused(self) -> bool:
        """Whether the run goes on without it, as not even a micro-batch of 1 fits."""
        return self.micro_batch_limit == 0

    @property
    def is_taking_part(self) -> bool:
        """Whether it has neither refused the run nor been excused from it."""
        return self.status != "refused" and not self.is_excused

    @property
    def excuse(self) -> str:
        """Why, in one line."""
        return f"over the memory budget with a micro-batch of {max(1, self.micro_batch)}"

    @property
    def has_ended(self) -> bool:
        """Whether it has said with which weights it ended."""
        return self.status == "done" and bool(self.weights_digest)

    def may_answer(self, round_: int) -> bool:
        """Whether the open round should wait for it."""
        return self.is_alive and self.refused_round != round_


def refusal(run: str, session: int, detail: str) -> Order:
    """The order to leave for good."""
    return Order(run, "refuse", session, detail=detail)


def introduction(run: str, session: int) -> Order:
    """The order to say hello, for a device that takes itself for enrolled: the journal may be an older copy."""
    return Order(run, "introduce", session)


class Roster:
    """All enrolled devices.

    Attributes:
        members: By device id.
        is_numbered: Whether the run has started, and everybody has an ordinal.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.is_numbered = False
        self._names: list[str] = []
        self._packed = b""
        self._unpacked: list[str] = []

    def get(self, name: str) -> Member | None:
        """The device, if it is enrolled."""
        return self.members.get(name)

    def greet(self, run: str, name: str, hello: Hello) -> tuple[Order, bool]:
        """The answer to an introduction, and whether it enrolled a new device."""
        member = self.members.get(name)
        if member is None and len(self.members) >= MAX_DEVICES:
            return refusal(run, hello.session, FULL), False
        if member is not None and hello.session < member.session:
            return refusal(run, hello.session, REPLACED), False
        is_new, member = member is None, self.enrol(name, hello)
        member.take_hello(hello)
        return member.welcome(run), is_new

    def enrol(self, name: str, hello: Hello) -> Member:
        """Add a device, or return the one that is there. Once the run has started it gets the next ordinal."""
        member = self.members.get(name)
        if member is None:
            member = Member(name, -1, hello, session=hello.session)
            self.members[name] = member
            if self.is_numbered:
                self._give_number(member)
        return member

    def number(self) -> None:
        """Number everybody in the order of names, once, so that a run does not depend on who came first."""
        if not self.is_numbered:
            self.is_numbered = True
            for name in sorted(self.members):
                self._give_number(self.members[name])

    def _give_number(self, member: Member) -> None:
        member.ordinal = len(self._names)
        self._names.append(member.name)

    @property
    def state_bytes(self) -> int:
        """Length of :meth:`state` in a snapshot, roughly."""
        return 24 * len(self.members)

    def state(self) -> dict[str, list[Any]]:
        """What a snapshot says of the devices, in the order of ordinals, as JSON types.

        Whoever is neither ready nor done is joining: that it was lost, say, may not hold any more.
        """
        members = [self.members[name] for name in self._names]
        columns = {field: [getattr(member, field) for member in members] for field in _KEPT}
        columns["status"] = [status if status in ("ready", "done") else "joining" for status in columns["status"]]
        return {"name": list(self._names), **columns}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Go to the state of :meth:`state`; the devices are enrolled.

        Raises:
            KeyError, TypeError, ValueError: It is nothing of the kind.
        """
        if state.keys() != {"name", *_KEPT}:
            raise ValueError(f"it keeps {sorted(state)} of a device, not {sorted(_KEPT)}")
        self.is_numbered, self._names, self._packed = True, [], b""
        for name, *values in zip(state["name"], *(state[field] for field in _KEPT), strict=True):
            member = self.members[name]
            self._give_number(member)
            for field, value in zip(_KEPT, values, strict=True):
                setattr(member, field, value)

    def ready(self) -> list[Member]:
        """Devices that a new round can count on, in the order of ordinals."""
        ready = [member for member in self.members.values() if member.is_ready]
        return sorted(ready, key=lambda member: member.ordinal)

    def forget_presence(self) -> None:
        """Nobody has been heard of for an unknown time."""
        for member in self.members.values():
            member.status, member.silent = "joining", False

    def count_ready(self) -> int:
        """How many devices a new round can count on."""
        return sum(member.is_ready for member in self.members.values())

    def finalists(self, packed: bytes) -> list[Member]:
        """Devices to wait for at the end, in the order of ordinals: who is there, and who took part until now.

        A link that broke a moment ago comes back soon, and whoever is not waited for never gets the last updates. Who
        missed a deadline may only be slow: that its link is gone would have been said.

        Args:
            packed: Participants of the last round.
        """
        members = {name: self.members[name] for name in self.names_of(packed)}
        members |= {name: member for name, member in self.members.items() if member.status in ("joining", "ready")}
        return sorted((m for m in members.values() if m.is_taking_part), key=lambda member: member.ordinal)

    def is_done(self, packed: bytes) -> bool:
        """Whether everybody has ended who may still be heard of, and all of a packed set who have not left for good.

        The latest first: many end in the order in which they came, and each of them asks.
        """
        names = self.names_of(packed)
        return all(m.status == "done" or not m.is_alive for m in reversed(self.members.values())) and all(
            m.status in ("done", "left") or not m.is_taking_part for m in map(self.members.__getitem__, names)
        )

    def names_of(self, packed: bytes) -> list[str]:
        """Device ids of a packed set of ordinals, ascending."""
        if packed != self._packed:
            self._packed = packed
            self._unpacked = [self._names[int(i)] for i in unpack_participants(packed) if i < len(self._names)]
        return self._unpacked
