"""Who may take part in a run, while it runs: what ``fedzo credentials`` changes takes effect without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from ...protocol.errors import FedzoError
from ..brokers.base import Broker
from .credential_folder import CredentialFolder
from .signing import RunSigner

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["REVOKED", "Access", "AccessWatch"]

_log = logging.getLogger(__name__)

WATCH_S = 1.0
_EVENT = {"event": "credentials"}
REVOKED = "its credentials were revoked"


class Access:
    """The run's key, and whose messages count.

    A broker of one's own lets nobody else in. The coordinator looks again, as another broker may be slow to follow, or
    not follow at all.

    Args:
        signer: Signs what devices are told.
        folder: Whose devices are admitted; anybody without it.
    """

    def __init__(self, signer: RunSigner, folder: CredentialFolder | None = None) -> None:
        self.signer = signer
        self._admitted = None if folder is None else folder.registry.admitted()

    def admits(self, device: str) -> bool:
        """Whether what this device says counts; from any thread."""
        admitted = self._admitted
        return admitted is None or device in admitted

    def admit(self, devices: frozenset[str]) -> None:
        """From now on these, and nobody else; from any thread."""
        self._admitted = devices


class AccessWatch:
    """Follows a credentials folder: a thread that lives as long as the context.

    Args:
        folder: Its registry is looked at once a second.
        access: Is told who is admitted.
        broker: Is told the logins.
        dismiss: Is told who is admitted, so that nobody waits for the others.
    """

    def __init__(
        self, folder: CredentialFolder, access: Access, broker: Broker, dismiss: Callable[[frozenset[str]], None]
    ) -> None:
        self._folder, self._access, self._broker, self._dismiss = folder, access, broker, dismiss
        self._is_failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="credentials", daemon=True)

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_S):
            if not (self._is_failing or self._folder.has_changed()):
                continue
            try:
                self._folder.reload()
                self._take()
                # The broker last: what it may not be able to do must not keep the coordinator from doing its part.
                is_told = self._broker.update_credentials(self._folder.registry.credentials())
            except (FedzoError, OSError, LookupError) as error:  # A thread that ends would miss every later change.
                if not self._is_failing:  # Once; it is tried again as long as it fails.
                    _log.error("the changed credentials are not in force: %s", error, extra=_EVENT)
                self._is_failing = True
                continue
            self._is_failing = False
            if is_told:
                _log.warning("the credentials have changed and are in force", extra=_EVENT)
            else:
                text = (
                    "the credentials have changed: this server follows them, its broker not before it is told to reload"
                )
                _log.warning(text, extra=_EVENT)

    def _take(self) -> None:
        admitted = self._folder.registry.admitted()
        self._access.admit(admitted)
        self._dismiss(admitted)
