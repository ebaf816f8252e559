"""Links that end soon after they began, again and again: what a broker does to the older of two equal client ids."""

from __future__ import annotations

import time

__all__ = ["ShortLinks"]

SHORT_S = 30.0  # a link that ends sooner
MANY_SHORT_LINKS = 3


class ShortLinks:
    """Counts short links in a row."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._count = 0

    def began(self) -> None:
        """There is a link."""
        self._began_at = time.monotonic()

    def ended(self) -> bool:
        """It is lost, or there was none; True once, for the short link that makes it too many in a row."""
        if self._began_at is None:
            return False
        self._count = self._count + 1 if time.monotonic() - self._began_at < SHORT_S else 0
        self._began_at = None
        return self._count == MANY_SHORT_LINKS
