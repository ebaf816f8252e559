"""When, and with which version of MQTT, the next connection is tried."""

from __future__ import annotations

import random

from .link_loss import Loss
from .mqtt_types import ProtocolName

__all__ = ["Retry"]

_BASE_S = 1.0
_CAP_S = 60.0
_FIRST_CONNECT_CAP_S = 2.0  # before the first success somebody waits in `connect`

_CONNACK_TIMEOUT_S = 10.0
# A plain amqtt takes an MQTT 5 CONNECT with properties for 3.1.1 and waits for more bytes, for ever.
_FIRST_V5_CONNACK_TIMEOUT_S = 4.0


class Retry:
    """Full-jitter exponential back-off, and the fall-back from MQTT 5 to 3.1.1.

    Jitter over the whole interval keeps a fleet from coming back in waves after a restart of the broker (Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """

    def __init__(self) -> None:
        self.protocol: ProtocolName = "5"
        self._v5_refused = False
        self._v5_accepted = False
        self._succeeded = False
        self._attempt = 0

    @property
    def connack_timeout_s(self) -> float:
        """How long the next attempt waits for the broker's answer."""
        return _FIRST_V5_CONNACK_TIMEOUT_S if self.protocol == "5" and not self._v5_accepted else _CONNACK_TIMEOUT_S

    def accepted(self) -> None:
        """Note that the broker accepted the current version."""
        self._v5_accepted = self._v5_accepted or self.protocol == "5"
        self._succeeded = True

    def delay_s(self, loss: Loss, *, stable: bool) -> float | None:
        """Choose version and delay of the next attempt.

        A refused version is remembered. A link dropped before CONNACK may also mean a broker that is just going down,
        so it only earns one attempt with 3.1.1, and the loss after that goes back to 5.

        Args:
            loss: Why the last attempt ended.
            stable: Whether its connection had been usable for a while; if so the back-off starts anew.

        Returns:
            The delay, or None when this was no failure yet: the other version should follow at once.
        """
        if self.protocol == "5":
            if loss.version_refused or loss.silent:
                self._v5_refused = loss.version_refused
                self.protocol = "3.1.1"
                return None
        elif not self._v5_refused or loss.version_refused or loss.silent:
            self._v5_refused = False
            self.protocol = "5"
        self._attempt = 0 if stable else self._attempt + 1
        cap_s = min(_CAP_S if self._succeeded else _FIRST_CONNECT_CAP_S, _BASE_S * 2.0 ** min(self._attempt, 10))
        return random.uniform(0.0, cap_s)  # noqa: S311 (spreads load, guards no secret)
