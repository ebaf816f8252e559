"""What the units of devices and of the server have in common: few rights, and how words are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ...protocol.errors import ConfigError

__all__ = ["HARDENING", "UNIT_FOLDER", "quoted", "unit_path"]

UNIT_FOLDER: Final = Path("/etc/systemd/system")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_@:,./=+-]+")

HARDENING: Final = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077"""


def unit_path(path: Path) -> str:
    """A path as a unit names it: absolute.

    Raises:
        ConfigError: It holds a control character.
    """
    text = str(path.expanduser().absolute())
    if not text.isprintable():
        raise ConfigError(f"the path {text!r} holds a character that a unit cannot")
    return text


def quoted(word: str) -> str:
    """A word of ``ExecStart``, see systemd.service(5), "Command lines".

    Raises:
        ConfigError: It holds a control character.
    """
    if not word.isprintable():
        raise ConfigError(f"{word!r} holds a character that a unit cannot")
    word = word.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
