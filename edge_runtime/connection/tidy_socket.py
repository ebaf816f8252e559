"""A TLS socket that leaves nothing open when the handshake fails."""

from __future__ import annotations

import ssl

__all__ = ["TidySocket"]


class TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails, which paho leaves to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        """As the base class."""
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise
