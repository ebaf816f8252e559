"""Wake a thread that waits for its sockets."""

from __future__ import annotations

import errno
import selectors
import socket

__all__ = ["Wake"]


class Wake:
    """Lets another thread end a wait of the network thread."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)
        self._is_set = False

    def set(self) -> None:
        """End the current wait, or the next one. From any thread, also after `close`."""
        if self._is_set:  # A server that answers thousands of boards at once would make a system call for each.
            return
        self._is_set = True
        try:
            self._sender.send(b"\0")
        except OSError as error:
            # A full buffer means that the other side is awake already; EBADF that it is closed.
            if error.errno not in (errno.EAGAIN, errno.EBADF, errno.EPIPE):
                raise

    def clear(self) -> None:
        """Forget wake-ups so far; whoever waits then looks at what there is to do."""
        try:
            while self.receiver.recv(4096):
                pass
        except BlockingIOError:
            pass
        # Last: a call of `set` up to here may send nothing, but its reason is there to be seen. Were it the first line,
        # a byte sent in between would be read here, and no later call would send another.
        self._is_set = False

    def wait(self, timeout_s: float) -> None:
        """Wait for `set`, no longer than `timeout_s`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.receiver, selectors.EVENT_READ)
            selector.select(timeout_s)
        self.clear()

    def close(self) -> None:
        """Free both sockets."""
        self.receiver.close()
        self._sender.close()
