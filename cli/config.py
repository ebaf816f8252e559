"""The settings of a command; shared with the board's own command, so the module lies with the board runtime."""

from __future__ import annotations

from ..edge_runtime.config import ConfigFile, Origin, Resolved, find_file, resolve

__all__ = ["ConfigFile", "Origin", "Resolved", "find_file", "resolve"]
