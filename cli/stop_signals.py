"""SIGTERM and SIGINT of `fedzo serve`, from before it imports anything large until its last line is printed.

Imports the standard library only.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StopSignals"]


class _Stopped(BaseException):
    """There is no server yet, and there need not be one. No ``Exception``: nothing on the way may take it for one."""


class _Stoppable(Protocol):
    def stop(self) -> None: ...


class StopSignals:
    """The first signal lets a server record what has arrived and leave, a second one ends the process at once.

    A signal that comes while there is no server is noted, and taken where :meth:`check` is called: an exception at any
    other point might leave a broker or half a folder behind. As a context it takes the signals, ends quietly when one
    stopped it before there was a server, and ends with ``KeyboardInterrupt`` after SIGINT.

    Attributes:
        received: The signals so far.
        came_early: One ended the context before there was a server.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.came_early = False
        self._server: _Stoppable | None = None
        self._is_safe = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for number, before in self._before.items():
            signal.signal(number, before)
        self.came_early = kind is _Stopped
        if signal.SIGINT in self.received and (kind is None or self.came_early):
            raise KeyboardInterrupt from None
        return self.came_early

    def check(self) -> None:
        """Leave the context here if a signal has come: nothing has begun that somebody must end."""
        if self.received:
            raise _Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What takes long and leaves nothing behind, wherever it is cut off."""
        self.check()
        self._is_safe = True
        try:
            yield
        finally:
            self._is_safe = False

    @contextmanager
    def stopping(self, server: _Stoppable) -> Iterator[None]:
        """While there is a server, it is what a signal stops; one that came before as well."""
        self._server = server
        if self.received:
            server.stop()
        try:
            yield
        finally:
            self._server = None

    def _take(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)
        if self._server is not None:
            self._server.stop()
        elif self._is_safe:
            raise _Stopped
