"""Waiting for devices before a round: all at the start, a quorum in between or when the time is over."""

from __future__ import annotations

from ..errors import QuorumError
from ..settings import RunSettings
from .roster import Roster

__all__ = ["Gathering"]


class Gathering:
    """The wait for the next round.

    Args:
        roster: The devices.
        settings: Of the run.

    Attributes:
        until: When it is over; None while a round is open, and before the first event.
    """

    def __init__(self, roster: Roster, settings: RunSettings) -> None:
        self.until: float | None = None
        self._roster = roster
        self._settings = settings
        self._target = settings.devices
        self._shortfall = 0

    def expect_all(self) -> None:
        """The next round should begin with every device of the settings."""
        self._target = self._settings.devices

    def expect_quorum(self) -> None:
        """The run has begun: a quorum is enough."""
        self._target = self._settings.quorum

    def expect_one_more(self, now: float) -> None:
        """A board plans again and those that are ready do not make up the quorum: wait for it, for one deadline.

        Without that, rounds that cannot succeed would follow each other as fast as the others decline.
        """
        ready = self._roster.count_ready()
        if ready >= self._settings.quorum:
            self._target, self._shortfall = ready + 1, 0
            self.until = now + self._settings.deadline_s

    def is_complete(self, now: float) -> bool:
        """Whether enough devices are ready.

        Raises:
            QuorumError: The time is over, and they are not.
        """
        over = self.until is not None and now >= self.until
        wanted = self._settings.quorum if over else self._target
        self._shortfall -= 1  # One event makes at most one device ready: many can join without being counted each time.
        if self._shortfall > 0 and not over:
            return False
        ready = self._roster.count_ready()
        self._shortfall = wanted - ready
        if over and ready < wanted:
            raise QuorumError(
                f"{ready} {'device is' if ready == 1 else 'devices are'} ready, the quorum is {self._settings.quorum}",
                hint="start more devices and resume the run",
            )
        return ready >= wanted
