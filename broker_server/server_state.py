"""A server's state, taken while it works."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..edge_runtime.connection.inbox import Inbox
from ..edge_runtime.connection.transport import MqttTransport
from ..protocol.server_side.coordinator import Coordinator
from ..protocol.server_side.roster import Member
from .telemetry.observer import Queue, ServerState

__all__ = ["DEVICE_STATES", "device_state", "server_state"]

DEVICE_STATES = ("joining", "ready", "done", "refused", "left", "lost", "silent", "excused")


def device_state(member: Member) -> str:
    """One word for a device: the presence it gave, unless it has missed a deadline since or takes no part."""
    if member.is_excused:
        return "excused"
    return "silent" if member.silent and member.status in ("joining", "ready") else member.status


def server_state(
    coordinator: Coordinator,
    inbox: Inbox[Any],
    transport: MqttTransport,
    *,
    passes: int,
    dropped: Mapping[str, int],
    turned_at: float,
) -> ServerState:
    """Look at the parts of a server.

    Args:
        coordinator: The run.
        inbox: What waits for the loop.
        transport: The link.
        passes: Computations of the server's own that wait or run.
        dropped: What was given up so far, by reason.
        turned_at: When the loop last turned, by ``time.monotonic``.
    """
    head, outbound, traffic = coordinator.head, transport.queue, transport.traffic
    states = Counter(map(device_state, list(coordinator.roster.members.values())))
    return ServerState(
        run=coordinator.run.run,
        phase=head.phase,
        round=head.round,
        updates=coordinator.replica.index,
        updates_total=coordinator.run.training.rounds,
        devices={state: states[state] for state in DEVICE_STATES},
        is_connected=transport.connected,
        is_leaving=coordinator.leaving,
        turned_s_ago=max(0.0, time.monotonic() - turned_at),
        queues=(
            Queue("inbound", len(inbox), inbox.max_messages, inbox.bytes, inbox.max_bytes),
            Queue("outbound", len(outbound), outbound.capacity, outbound.bytes, outbound.max_bytes),
            Queue("passes", passes, 0),
        ),
        dropped={**dropped, "unsent": dropped["unsent"] + outbound.forgotten},
        pauses=inbox.pauses,
        bytes_in=traffic.bytes_down,
        bytes_out=traffic.bytes_up,
        messages_in=traffic.down.messages,
        messages_out=traffic.up.messages,
    )
