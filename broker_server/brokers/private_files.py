"""Files that only their owner may read."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ...protocol.errors import ConfigError

__all__ = ["PrivateFolder", "read_private", "write_private"]

_OWNER = "owner.lock"


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably; its mode is 0600 from the first byte on.

    Raises:
        ConfigError: The folder is missing, read-only or full.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes files 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
            _sync_folder(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="check the folder and its free space"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Let a rename in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_private(path: Path, limit_bytes: int) -> bytes:
    """Read a whole file.

    Raises:
        ConfigError: It cannot be read, or is larger than `limit_bytes`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check the path and its rights") from None
    if len(data) > limit_bytes:
        raise ConfigError(f"{path} is larger than {limit_bytes} bytes")
    return data


class PrivateFolder:
    """A temporary folder, mode 0700. One whose owner was killed is removed when the next one is made.

    Attributes:
        path: Where it is.
    """

    def __init__(self, prefix: str) -> None:
        """Make it, and sweep.

        Raises:
            ConfigError: The system's temporary folder cannot be written.
        """
        parent = Path(tempfile.gettempdir())
        for abandoned in parent.glob(f"{prefix}*"):
            _remove_abandoned(abandoned)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # The lock ends with this process, however it ends; children do not inherit it.
            self._owner: int | None = os.open(self.path / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._owner, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"cannot make a folder in {parent}: {error.strerror}", hint="set TMPDIR") from None

    def remove(self) -> None:
        """Delete it with all that is in it. Idempotent."""
        if self._owner is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._owner)
            self._owner = None


def _remove_abandoned(folder: Path) -> None:
    try:
        handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # not ours, or just being made or removed
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its owner lives
    finally:
        os.close(handle)
