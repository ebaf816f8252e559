"""Refusals by a few fixed words, for counting: the journal keeps the whole text."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["GARBLED", "REASONS", "refusal_reason"]

# In this order; what the checks of protocol/server_side/aggregation.py and protocol/server_side/open_round.py say.
_PATTERNS: Final = (
    ("participant", r"not a participant"),
    ("kind", r"report in a \w+ round"),
    ("weights", r"other weights"),
    ("shape", r"blocks of .* scalars instead"),
    ("samples", r"samples behind the scalars"),
    ("limit", r"over the limit"),
    ("range", r"is negative|correct answers of|not finite"),
    ("scores", r"scores differ"),
)
GARBLED: Final = "garbled"
"""What is no message at all; the journal has entries of its own for it."""

REASONS: Final = (*(name for name, _ in _PATTERNS), GARBLED, "other")


def refusal_reason(text: str) -> str:
    """The word for a refusal; ``other`` for a text that is not known here."""
    return next((name for name, pattern in _PATTERNS if re.search(pattern, text)), "other")
