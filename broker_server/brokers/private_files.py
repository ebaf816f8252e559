"""Files that only their owner may read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...protocol.errors import ConfigError

__all__ = ["read_private", "write_private"]


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically; its mode is 0600 from the first byte on.

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
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
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
