"""The report that has no receipt yet, in one file: a device that is killed sends it again when it is back.

What becomes of it is one step on the disk, too. A report that counts, or may count, is renamed: ``outbox.sent`` is the
latest of them. One that does not count is removed. So the disk always says of a round whose state is in the residual
file whether its scalars may have moved the weights (:meth:`Outbox.may_count`), whatever the device died of.

The file is ``FZO1``, 32 bytes of SHA-256 over the rest, the length of the run id (one byte), the run id, the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from ...protocol.errors import ConfigError, ProtocolError
from ...protocol.wire.codec import decode
from ...protocol.wire.framing import MAX_PAYLOAD_BYTES
from ...protocol.wire.messages import Report
from ...protocol.wire.topics import check_name
from .durable import write_durably

__all__ = ["Outbox"]

_log = logging.getLogger(__name__)
_MAGIC = b"FZO1"
_HEADER_BYTES = len(_MAGIC) + 32


class Outbox:
    """At most one report on the disk, and the latest one that may count.

    Args:
        path: Its file; the folder exists.

    Attributes:
        path: Of the report without a receipt.
        sent: Of the latest report that may count.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.sent = path, path.with_name(f"{path.name}.sent")
        self._was_damaged = False

    def save(self, run: str, report: Report) -> None:
        """Keep the report in place of the one before; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written; the report before it is still there.
        """
        body = bytes([len(run)]) + run.encode() + report.encode()
        write_durably(self.path, _MAGIC + hashlib.sha256(body).digest() + body)

    def drop(self, *, is_lost: bool = False) -> None:
        """The report needs not be sent any more.

        Args:
            is_lost: It counts in no update.

        Raises:
            OSError: The file cannot be removed or renamed.
        """
        with contextlib.suppress(FileNotFoundError):
            if is_lost:
                self.path.unlink()
            else:
                self.path.replace(self.sent)

    def may_count(self, run: str, round_: int) -> bool:
        """Whether scalars that were measured in a round may have left this device and count.

        They do not where the device died before the report was here, where nobody wanted it, and where the server said
        that it does not count. From a damaged file nobody can tell; then they may.
        """
        for path in (self.path, self.sent):  # in this order: one of them has it while it is renamed
            try:
                kept = _parse(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ConfigError, ProtocolError, ValueError):
                return True
            if kept[0] == run and kept[1].round >= round_:
                return True
        return self._was_damaged

    def load(self) -> tuple[str, Report] | None:
        """The run id and the report; None when there is none.

        A file that cannot be used is renamed to ``….damaged`` with a warning: losing one report costs one device in
        one round, not starting costs the device.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(_HEADER_BYTES + 256 + MAX_PAYLOAD_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the outbox %s cannot be read and is left alone: %s", self.path, error.strerror or error)
            return None
        try:
            return _parse(data)
        except (ConfigError, ProtocolError, ValueError) as error:
            self._was_damaged = True
            aside = self.path.with_name(f"{self.path.name}.damaged")
            _log.warning("the outbox %s is damaged (%s) and is set aside as %s", self.path, error, aside.name)
            try:
                self.path.replace(aside)
            except OSError as failure:
                _log.warning("it cannot be renamed: %s", failure.strerror or failure)
            return None


def _parse(data: bytes) -> tuple[str, Report]:
    body = data[_HEADER_BYTES:]
    if data[: len(_MAGIC)] != _MAGIC or not body:
        raise ValueError(f"{len(data)} bytes that are no outbox")
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : _HEADER_BYTES]:
        raise ValueError(f"{len(data)} bytes with another hash")
    length = body[0]
    run = check_name("run", body[1 : 1 + length].decode("ascii"))
    report = decode(body[1 + length :])
    if not isinstance(report, Report):
        raise ProtocolError("it holds no report")
    return run, report
