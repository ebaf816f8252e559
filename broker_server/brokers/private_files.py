"""Files that only their owner may read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ...edge_runtime.storage.durable import write_durably
from ...protocol.errors import ConfigError

__all__ = ["OWNER_NAME", "PrivateFolder", "read_private", "write_private"]

OWNER_NAME = "owner.lock"
_UNLOCKED = "owner.new"


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably; its mode is 0600 from the first byte on.

    Raises:
        ConfigError: The folder is missing, read-only or full.
    """
    try:
        write_durably(path, data)  # by a temporary file, which is 0600
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="check the folder and its free space"
        ) from None


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
    """A folder for as long as this process needs it, mode 0700. One whose owner was killed goes when the next is made.

    Attributes:
        path: Where it is.
    """

    def __init__(self, prefix: str, suffix: str = "", *, parent: Path | None = None, sweep: str = "") -> None:
        """Make it, and sweep.

        Args:
            prefix: Of its name.
            suffix: Of its name.
            parent: Where; made if missing. The system's temporary folder if not given.
            sweep: Pattern of the folders to remove if their owner is gone; those of this prefix and suffix if empty.

        Raises:
            ConfigError: The parent cannot be written.
        """
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        self._made_parent = parent if not parent.exists() else None
        handles: list[int] = []
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for abandoned in parent.glob(sweep or f"{prefix}*{suffix}"):
                _remove_abandoned(abandoned)
            self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
            # Locks end with this process, however it ends; children do not inherit them. The file has its name once it
            # is locked, so that nobody who sweeps is quicker.
            handles.append(os.open(self.path / _UNLOCKED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            fcntl.flock(handles[0], fcntl.LOCK_EX)
            (self.path / _UNLOCKED).rename(self.path / OWNER_NAME)
            # What cleans temporary folders by age leaves alone what is locked (tmpfiles.d(5), "Age").
            handles.append(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            with contextlib.suppress(OSError):  # Some file systems lock files only.
                fcntl.flock(handles[1], fcntl.LOCK_SH)
        except OSError as error:
            for handle in handles:
                os.close(handle)
                shutil.rmtree(self.path, ignore_errors=True)
            raise ConfigError(
                f"cannot make a folder in {parent}: {error.strerror}", hint="check its rights and its free space"
            ) from None
        self._handles = handles

    def remove(self) -> None:
        """Delete it with all that is in it, and its parent if that was made for it and is empty. Idempotent."""
        if self._handles:
            shutil.rmtree(self.path, ignore_errors=True)
            while self._handles:
                os.close(self._handles.pop())
            if self._made_parent is not None:
                with contextlib.suppress(OSError):
                    self._made_parent.rmdir()


def _remove_abandoned(folder: Path) -> None:
    try:
        handle = os.open(folder / OWNER_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # not ours, or just being made or removed
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its owner lives
    finally:
        os.close(handle)
