"""What a device keeps between starts: its id, its boot counter, blobs and the outbox, in one locked folder.

==============  ==============================================================================
file            content
==============  ==============================================================================
``id``          the device id
``session``     the boot counter, decimal; grows before anything else is done
``blobs/``      graphs and masks, named by their SHA-256
``outbox``      the report that has no receipt yet; as ``outbox.sent`` the latest that may count
``residual-*``  what a sketch has not sent yet, two files
``run-key``     the key that runs must be signed with, see ``run_key.py``
``lock``        held while a device runs; holds its process id
==============  ==============================================================================
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from ...protocol.errors import ConfigError
from ...protocol.wire.topics import check_name
from .artifact import BlobStore
from .durable import remove_leftovers, write_durably
from .outbox import Outbox
from .residual_file import ResidualFile

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DeviceState", "default_folder", "generate_id"]

_MAX_SESSION = (1 << 32) - 1
_LATEST_CLOCK_S = 4_102_444_800
"""The year 2100: a later clock is wrong, and would leave few or no starts to count."""


def default_folder(federation: str) -> Path:
    """``~/.local/state/fedzo/FEDERATION``, below ``XDG_STATE_HOME`` where that is set."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "fedzo" / federation


def generate_id() -> str:
    """A new device id: the host's name and four random bytes, for example ``pi-kitchen-1f00c0de``."""
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return f"{host[:39] or 'device'}-{secrets.token_hex(4)}"


class DeviceState:
    """The state folder of one device; opening it locks it and counts the start.

    Args:
        folder: The device's own folder. With None it lies below :func:`default_folder` and is named by the id.
        federation: Its federation, for the default folder.
        device: Its id. With None the id kept there is taken, or one is made and kept.

    Attributes:
        folder: Where the state lies.
        device: The device id.
        session: Boot counter, greater than in every start before; seconds since 1970 where the clock allows, which it
            does not from the year 2100 on.
        blobs: Local store of graphs and masks.
        outbox: The undelivered report.
        residuals: What the estimator has not sent yet.

    Raises:
        ConfigError: Another process uses the folder, it belongs to another id, it cannot be written, or its boot
            counter is damaged.
    """

    def __init__(self, folder: Path | None, *, federation: str, device: str | None) -> None:
        if device is not None:
            check_name("device id", device)
        try:
            base = folder or default_folder(federation)
            base.mkdir(parents=True, exist_ok=True)
            kept = _read(base / "id")
            # The id is kept where the folder is found without knowing it.
            self.device = device or (check_name(f"{base / 'id'}:", kept) if kept else generate_id())
            if folder is not None and kept not in ("", self.device):
                raise ConfigError(
                    f"the state folder {base} belongs to the device {kept}, not to {self.device}",
                    hint="give another --state, or leave --id away",
                )
            if not kept and (device is None or folder is not None):
                write_durably(base / "id", f"{self.device}\n".encode())
            self.folder = base if folder is not None else base / self.device
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder / "lock")
            try:
                remove_leftovers(self.folder)
                remove_leftovers(self.folder / "blobs")
                self.session = self._next_session()
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"the state folder cannot be used: {error}", hint="make it writable or give another one with --state"
            ) from error
        self.blobs = BlobStore(self.folder / "blobs")
        self.outbox = Outbox(self.folder / "outbox")
        self.residuals = ResidualFile(self.folder / "residual", self.outbox.may_count)

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_session(self) -> int:
        path = self.folder / "session"
        text = _read(path)
        if text and not (text.isascii() and text.isdecimal() and int(text) < _MAX_SESSION):
            raise ConfigError(
                f"the boot counter {path} holds {text[:40]!r}, no number below {_MAX_SESSION}",
                hint="write a number greater than in any start before, or use a new --id",
            )
        # The clock only helps a device whose state was lost: the server ignores sessions older than it has seen.
        clock = int(time.time())
        session = max(int(text or 0) + 1, clock if clock < _LATEST_CLOCK_S else 1)
        write_durably(path, f"{session}\n".encode())
        return session


def _read(path: Path) -> str:
    try:
        with path.open("r", encoding="utf-8", errors="replace") as file:
            return file.read(256).strip()
    except FileNotFoundError:
        return ""


def _locked(path: Path) -> IO[str]:
    """Open and lock a file for the life of the process; the system unlocks it, whatever ends the process."""
    file = path.open("a+", encoding="utf-8")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise ConfigError(
            f"another fedzo-device{f' (process {holder})' if holder else ''} uses {path.parent}",
            hint="stop it, or give this one its own --id or --state",
        ) from None
    with contextlib.suppress(OSError):  # The process id is for people only.
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
