"""What a process logs, as text for people or as JSON lines for machines; on stderr or into a file that is rotated.

A JSON line has ``ts`` (UTC), ``level``, ``event``, ``message``, and, where they are known, ``run``, ``round``,
``device`` and ``fields``. Code says what it knows by ``extra``::

    _log.warning("refused: %s", why, extra={"event": "refused", "round": 3, "device": "pi-1"})

Only the standard library is imported: boards log too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from ..protocol.errors import ConfigError

__all__ = ["CONTROL", "FILES", "FILE_BYTES", "LEVELS", "JsonLine", "LogFormat", "LogLevel", "Logs", "TextLine"]

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: Final[tuple[LogLevel, ...]] = ("debug", "info", "warning", "error")

FILE_BYTES: Final = 16 << 20
"""A log file of this size is renamed to ``FILE.1``."""
FILES: Final = 5
"""So many old files are kept."""

# Text of a peer, a path or an exception is shown, never executed by a terminal.
CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTEXT: Final = ("run", "round", "device")


class TextLine(logging.Formatter):
    """``warning: text``, with control characters shown; a traceback keeps its lines.

    Args:
        stamped: Begin with the time, for files.
    """

    def __init__(self, *, stamped: bool = False) -> None:
        super().__init__()
        self._stamped = stamped

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        stamp = f"{timestamp(record.created)} " if self._stamped else ""
        text = f"{stamp}{record.levelname.lower()}: {record.getMessage()}".translate(CONTROL)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonLine(logging.Formatter):
    """One JSON object a line.

    Args:
        context: ``run`` and ``device`` of records that do not name theirs; may be filled later.
    """

    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        line: dict[str, Any] = {
            "ts": timestamp(record.created),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
        }
        for name in _CONTEXT:
            value = getattr(record, name, self._context.get(name))
            if value not in (None, ""):
                line[name] = value
        line["logger"] = record.name
        if fields := getattr(record, "fields", None):
            line["fields"] = fields
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return json.dumps(line, ensure_ascii=True, allow_nan=False)
        except (TypeError, ValueError):  # a field that JSON has no form for, such as NaN
            line["fields"] = {name: str(value) for name, value in line.get("fields", {}).items()}
            return json.dumps(line, ensure_ascii=True, default=str)


def timestamp(seconds: float) -> str:
    """RFC 3339 with milliseconds, in UTC."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


class Logs:
    """Shows what fedzo logs, from construction to :meth:`close`.

    Args:
        form: Of the lines.
        file: Where to; stderr when None. With a file, warnings also appear on stderr as text.
        level: The least; by default ``warning`` for text on stderr, else ``info``.

    Attributes:
        context: ``run`` and ``device`` of JSON lines.
        takes_stderr: stderr is for JSON lines alone.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, form: LogFormat = "text", file: Path | None = None, level: LogLevel | None = None) -> None:
        self.context: dict[str, str] = {}
        self.takes_stderr = form == "json" and file is None
        usual = "warning" if form == "text" and file is None else "info"
        least = getattr(logging, (level or usual).upper())
        self._logger = logging.getLogger("fedzo")
        self._handlers: list[logging.Handler] = []
        stderr = _Stderr()
        stderr.setLevel(least if file is None else logging.WARNING)
        stderr.setFormatter(JsonLine(self.context) if self.takes_stderr else TextLine())
        self._handlers.append(stderr)
        if file is not None:
            handler = _file_handler(file)
            handler.setLevel(least)
            handler.setFormatter(JsonLine(self.context) if form == "json" else TextLine(stamped=True))
            self._handlers.append(handler)
        for handler in self._handlers:
            self._logger.addHandler(handler)
        self._level = self._logger.level
        self._logger.setLevel(min(handler.level for handler in self._handlers))

    def say(self, text: str, *, level: LogLevel = "info") -> None:
        """A line for people on stderr; where that is for JSON, one of these. In the file as well.

        Args:
            text: The line.
            level: Of the JSON line.
        """
        if not self.takes_stderr:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{text.translate(CONTROL)}\n")
                sys.stderr.flush()
        self.note(text, level=level)

    def note(self, text: str, *, level: LogLevel = "info") -> None:
        """The same without text on stderr."""
        number = getattr(logging, level.upper())
        record = self._logger.makeRecord("fedzo", number, "", 0, text, (), None, extra={"event": "message"})
        for handler in self._handlers:
            if record.levelno >= handler.level and (self.takes_stderr or not isinstance(handler, _Stderr)):
                handler.handle(record)

    def close(self) -> None:
        """Write what is buffered, and log no more. Idempotent."""
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        if self._handlers:
            self._logger.setLevel(self._level)
        self._handlers.clear()


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic in stubs only
    """stderr as it is at the time: a live display may stand in front of it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is the base class's)
        """Nobody reads stderr any more: there is nowhere to say so."""


def _file_handler(file: Path) -> logging.Handler:
    from logging.handlers import RotatingFileHandler

    class RotatingFile(RotatingFileHandler):
        """Says once that its disk is full, not at every line."""

        failed = False

        def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
            """Go on: a log is not worth a run."""
            if not self.failed:
                self.failed = True
                sys.stderr.write(f"warning: the log {file} cannot be written\n")

    try:
        return RotatingFile(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the log file {file} cannot be written: {error.strerror or error}", hint="see --log-file"
        ) from error
