"""What a run came to, in numbers: out of its journal, its coordinator and the traffic of this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...protocol.errors import ProtocolError
from ...protocol.server_side.coordinator import Coordinator
from ...protocol.wire.messages import report_numbers
from ...protocol.wire.topics import TO_DEVICE, parse_topic
from ..journal import Journal

__all__ = ["Summary", "held_out_accuracy", "summarise"]


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of a run.

    Attributes:
        run: Run id.
        phase: Where it stands.
        accuracy: Held-out accuracy: the server's test set if it has one, else the devices' own; None if neither.
        device_accuracy: Accuracy on the devices' own held-out samples.
        rounds: Updates made.
        queries: Forward passes of all devices, one per batch and set of weights.
        reports: Accepted reports.
        refused: Refused reports.
        refusals: The latest of each device, as ``NAME: why``; also of one whose scores are not the server's own.
        bytes_up_per_device_round: PUBLISH packets from a device, per update since the server started, in bytes;
            acknowledgements (4 bytes each), connecting and pings come on top.
        bytes_down_per_device_round: PUBLISH packets to a device, likewise; the graphs included.
        device_peak_rss_mib: Largest peak that a device reported.
        survivors: Weights that the mask keeps.
        parameters: Weights of the dense model.
        mask_bytes: Size of the encoded mask.
        weights_digest: Digest of the server's weights, hex.
        evaluated: What the accuracies belong to: the ``last`` weights, or their ``average`` over the updates.
        learning_rate: Peak rate; the one that was found after a range test.
        digests_agree: Whether every enrolled device ended with that digest, except those that refused or were excused;
            None where nobody said another one, but somebody has not said (or not yet) with which it ended.
        devices: Enrolled devices.
        excused: Devices that needed more memory than they may use whatever the micro-batch, as ``NAME: why``.
        curve: ``(updates, accuracy)`` of every evaluation, oldest first.
    """

    run: str
    phase: str
    accuracy: float | None
    device_accuracy: float | None
    rounds: int
    queries: int
    reports: int
    refused: int
    refusals: tuple[str, ...]
    bytes_up_per_device_round: float
    bytes_down_per_device_round: float
    device_peak_rss_mib: float
    survivors: int
    parameters: int
    mask_bytes: int
    weights_digest: str
    evaluated: str
    learning_rate: float
    digests_agree: bool | None
    devices: int
    excused: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]


def held_out_accuracy(evaluation: Mapping[str, float | int | str | None]) -> float | None:
    """Accuracy of one evaluation: on the server's test set if it has one, else on the devices' own samples."""
    server = evaluation["server_accuracy"]
    accuracy = evaluation["accuracy"] if server is None else server
    return None if accuracy is None else float(accuracy)


def summarise(
    coordinator: Coordinator, journal: Journal, traffic: Mapping[str, tuple[int, int]], *, resumed_at: int = 0
) -> Summary:
    """Add up a run.

    Args:
        coordinator: After the run.
        journal: Its journal.
        traffic: MQTT bytes by topic, ``(sent by the server, received by the server)``.
        resumed_at: Updates that the traffic has nothing to do with, because an earlier process made them.
    """
    queries = reports = refused = peak_kib = 0
    refusals: dict[str, str] = {}
    for _, entry in journal.read(kinds={"report", "refusal"}):
        if entry.kind == "refusal":
            refused += 1
            refusals[entry.device] = entry.payload.decode(errors="replace")
            continue
        message = report_numbers(entry.payload)
        reports += 1
        queries += message.queries
        peak_kib = max(peak_kib, message.peak_rss_kib)
    up = down = 0.0
    members = coordinator.roster.members
    devices = max(1, len(members))
    for name, (sent, received) in traffic.items():
        up += received / devices
        try:
            to_one = parse_topic(name).channel in TO_DEVICE
        except ProtocolError:  # topics beyond those that are counted one by one; nearly all go to one device
            down += sent / devices
            continue
        down += sent / devices if to_one else sent
    rounds = max(1, coordinator.replica.index - resumed_at)
    curve = tuple(
        (int(found["log_length"] or 0), float(accuracy))
        for found in coordinator.evaluations
        if (accuracy := held_out_accuracy(found)) is not None
    )
    own = coordinator.evaluations[-1]["accuracy"] if coordinator.evaluations else None
    digest = coordinator.replica.digest.hex()
    return Summary(
        run=coordinator.run.run,
        phase=coordinator.head.phase,
        accuracy=curve[-1][1] if curve else None,
        device_accuracy=None if own is None else float(own),
        rounds=coordinator.replica.index,
        queries=queries,
        reports=reports,
        refused=refused,
        refusals=tuple(f"{name}: {why}" for name, why in sorted(refusals.items())),
        bytes_up_per_device_round=round(up / rounds, 1),
        bytes_down_per_device_round=round(down / rounds, 1),
        device_peak_rss_mib=round(peak_kib / 1024, 1),
        survivors=coordinator.mask.n_survivors,
        parameters=coordinator.manifest.layout.size,
        mask_bytes=coordinator.head.mask_size,
        weights_digest=digest,
        evaluated="average" if coordinator.run.training.optimiser.ema else "last",
        learning_rate=coordinator.run.training.learning_rate,
        digests_agree=_agreement(coordinator, digest),
        devices=len(members),
        excused=tuple(f"{name}: {member.excuse}" for name, member in sorted(members.items()) if member.is_excused),
        curve=curve,
    )


def _agreement(coordinator: Coordinator, digest: str) -> bool | None:
    """See ``Summary.digests_agree``; before the run is done, boards are at other places of the log."""
    taking_part = [member for member in coordinator.roster.members.values() if member.is_taking_part]
    if coordinator.head.phase != "done" or not taking_part:
        return None
    if any(member.has_ended and member.weights_digest != digest for member in taking_part):
        return False
    return True if all(member.weights_digest == digest for member in taking_part) else None
