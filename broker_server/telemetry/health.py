"""Whether a server is alive, and whether it is ready: two lists of checks, made when somebody asks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .observer import ServerState

__all__ = ["FREE_BYTES", "LOOP_S", "Check", "Health"]

LOOP_S = 120.0  # a turn of the loop closes a round at most
FREE_BYTES = 16 << 20  # of the journal's disk


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is as it should be.
        detail: One line.
    """

    name: str
    ok: bool
    detail: str


class Health:
    """Looks at a server and at its journal's disk; from any thread."""

    def __init__(self) -> None:
        self._server: tuple[Callable[[], ServerState], Path] | None = None

    def attach(self, state: Callable[[], ServerState], journal: Path) -> None:
        """From now on the checks are of this server.

        Args:
            state: Gives its state.
            journal: Its journal's file.
        """
        self._server = state, journal

    def live(self) -> list[Check]:
        """What only a restart mends: the loop turns."""
        if self._server is None:
            return [Check("loop", True, "starting")]
        return [_loop(self._server[0]())]

    def ready(self) -> list[Check]:
        """What has to hold for reports to be taken."""
        if self._server is None:
            return [Check("server", False, "starting")]
        read, journal = self._server
        state = read()
        return [
            _loop(state),
            Check("broker", state.is_connected, "connected" if state.is_connected else "no link"),
            _writable(journal),
            Check("run", not state.is_leaving, "leaving" if state.is_leaving else f"{state.phase} {state.round}"),
        ]


def _loop(state: ServerState) -> Check:
    return Check("loop", state.turned_s_ago < LOOP_S, f"turned {state.turned_s_ago:.1f} s ago")


def _writable(journal: Path) -> Check:
    """Without writing: a probe every few seconds for months would be a load of its own."""
    try:
        disk = os.statvfs(journal)
    except OSError as error:
        return Check("journal", False, f"{error.strerror or error}")
    if disk.f_flag & os.ST_RDONLY or not os.access(journal, os.W_OK):
        return Check("journal", False, "read-only")
    free = disk.f_bavail * disk.f_frsize
    return Check("journal", free >= FREE_BYTES, f"{free >> 20} MiB free")
