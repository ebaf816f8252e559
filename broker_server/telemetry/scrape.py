"""What a serving process tells at its metrics endpoint, for `fedzo status`."""

from __future__ import annotations

import http.client
import urllib.request
from dataclasses import dataclass

from ...protocol.errors import ConfigError

__all__ = ["LiveState", "scrape"]

_TIMEOUT_S = 2.0
_MOST_BYTES = 4 << 20
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine


@dataclass(frozen=True, slots=True)
class LiveState:
    """What only the process itself knows.

    Attributes:
        devices: Enrolled devices by what they last said of themselves.
        is_connected: The link to the broker is up.
        bytes_in: MQTT bytes received.
        bytes_out: MQTT bytes sent.
        resident_mib: Memory of the process.
        peak_mib: Its peak.
        queues: Entries that wait, by queue.
        dropped: What was given up, by reason; zeros left out.
        verdicts: Reports by what became of them; zeros left out.
    """

    devices: dict[str, int]
    is_connected: bool
    bytes_in: int
    bytes_out: int
    resident_mib: float
    peak_mib: float
    queues: dict[str, int]
    dropped: dict[str, int]
    verdicts: dict[str, int]


def scrape(url: str) -> LiveState | None:
    """Ask once.

    Args:
        url: ``http://HOST:PORT``.

    Returns:
        What there is; None when nobody answers there, or somebody else does.

    Raises:
        ConfigError: The URL is none of this kind.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of metrics", hint="give http://HOST:PORT")
    try:
        with _opener.open(f"{url.rstrip('/')}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read(_MOST_BYTES).decode()
        return _parse(text)
    except (OSError, http.client.HTTPException, ValueError, KeyError, ImportError):
        return None


def _parse(text: str) -> LiveState:
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, {})[next(iter(sample.labels.values()), "")] = sample.value

    def whole(name: str, *, zeros: bool = False) -> dict[str, int]:
        return {label: int(value) for label, value in values.get(name, {}).items() if value or zeros}

    traffic = whole("fedzo_mqtt_bytes_total", zeros=True)
    return LiveState(
        devices=whole("fedzo_devices"),
        is_connected=values["fedzo_broker_connected"][""] == 1,
        bytes_in=traffic["in"],
        bytes_out=traffic["out"],
        resident_mib=round(values.get("process_resident_memory_bytes", {}).get("", 0.0) / 2**20, 1),
        peak_mib=round(values["fedzo_process_peak_resident_memory_bytes"][""] / 2**20, 1),
        queues=whole("fedzo_queue_depth", zeros=True),
        dropped=whole("fedzo_dropped_total"),
        verdicts=whole("fedzo_reports_total"),
    )
