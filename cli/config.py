"""The settings of a command; shared with the board's own command, so the module lies with the board runtime."""

from __future__ import annotations

from ..edge_runtime.config import (
    ConfigFile,
    Origin,
    Resolved,
    default_values,
    find_file,
    resolve,
    unknown_variables,
)

__all__ = ["ConfigFile", "Origin", "Resolved", "default_values", "find_file", "resolve", "unknown_variables"]
