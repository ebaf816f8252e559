"""Gauges that are read when Prometheus asks: the state of a server and of its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ...edge_runtime.installation.versions import installed_versions
from ...edge_runtime.planning.memory import peak_rss_mib
from .observer import ServerState

__all__ = ["RUN_PHASES", "StateCollector"]

RUN_PHASES = ("enrol", "saliency", "train", "evaluate", "done", "stopped")


class StateCollector(Collector):
    """Asks for the server's state at every scrape.

    Args:
        state: Gives it; None while there is no server.
    """

    def __init__(self, state: Callable[[], ServerState | None]) -> None:
        self._state = state
        self._versions = {name.replace("-", "_"): text for name, text in installed_versions().items()}

    def describe(self) -> Iterator[Metric]:
        """What there will be, without asking the server."""
        yield from self._process()
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        """What there is now."""
        yield from self._process()
        if (state := self._state()) is not None:
            yield from _families(state)

    def _process(self) -> Iterator[Metric]:
        yield InfoMetricFamily("fedzo_build", "Versions of fedzo and of what it runs on.", self._versions)
        yield _gauge("process_peak_resident_memory_bytes", "Largest resident memory so far.", peak_rss_mib() * 2**20)


def _families(state: ServerState | None = None) -> Iterator[Metric]:
    """All families; without a state, those of no server, for their names."""
    if state is None:
        state = ServerState("", "enrol", 0, 0, 0, {}, False, False, 0.0, (), {}, 0, 0, 0, 0, 0)
    yield InfoMetricFamily("fedzo_run", "The run that is served.", {"run": state.run})
    phases = GaugeMetricFamily("fedzo_phase", "1 for the phase of the announced round.", labels=["phase"])
    for phase in RUN_PHASES:
        phases.add_metric([phase], phase == state.phase)
    yield phases
    yield _gauge("round", "Number of the announced round.", state.round)
    yield _gauge("updates", "Updates made, by earlier processes too.", state.updates)
    yield _gauge("updates_planned", "Updates to make.", state.updates_total)
    yield _labelled(GaugeMetricFamily("fedzo_devices", "Enrolled devices by state.", labels=["state"]), state.devices)
    yield _gauge("broker_connected", "1 while the link to the broker is up.", state.is_connected)
    yield _gauge("leaving", "1 once the server was asked to stop.", state.is_leaving)
    yield _gauge("loop_age_seconds", "Since the server's loop last turned.", state.turned_s_ago)
    for name, text, values in (
        ("queue_depth", "Entries that wait.", {queue.name: queue.depth for queue in state.queues}),
        ("queue_limit", "Most entries.", {q.name: q.limit for q in state.queues if q.limit}),
        ("queue_bytes", "Payloads that wait.", {q.name: q.bytes for q in state.queues if q.max_bytes}),
        ("queue_limit_bytes", "Most bytes of them.", {q.name: q.max_bytes for q in state.queues if q.max_bytes}),
    ):
        yield _labelled(GaugeMetricFamily(f"fedzo_{name}", text, labels=["queue"]), values)
    dropped = CounterMetricFamily("fedzo_dropped", "Messages that were given up, by reason.", labels=["reason"])
    yield _labelled(dropped, state.dropped)
    yield CounterMetricFamily(
        "fedzo_read_pauses", "Times that reading from the broker paused, as the loop was behind.", state.pauses
    )
    for name, text, received, sent in (
        ("mqtt_bytes", "MQTT packets of messages and acknowledgements.", state.bytes_in, state.bytes_out),
        ("mqtt_messages", "MQTT messages, resent ones included.", state.messages_in, state.messages_out),
    ):
        family = CounterMetricFamily(f"fedzo_{name}", text, labels=["direction"])
        yield _labelled(family, {"in": received, "out": sent})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fedzo_{name}", text, value)


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
