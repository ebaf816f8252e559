"""Passwords in the URL of a broker, where text is shown to everybody."""

from __future__ import annotations

import re

__all__ = ["has_password", "without_password"]

# Also of a URL that nothing can be made of, as one whose password holds a slash.
_USER = re.compile(r"(mqtts?://[^@:]*):.*@", re.IGNORECASE | re.DOTALL)


def has_password(text: str) -> bool:
    """Whether there is a URL with a password in the text."""
    return _USER.search(text) is not None


def without_password(text: str) -> str:
    """The text with such a password hidden."""
    return _USER.sub(r"\1:***@", text)
