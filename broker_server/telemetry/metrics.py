"""What a server tells Prometheus: counters and histograms out of its turns, gauges out of its state.

No series is per device or per round, so their number does not grow with a fleet or a run. The registry is the server's
own: nothing here is global.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from ...protocol.server_side.closings import Closing
from ...protocol.server_side.coordinator_events import Connected, DeviceSaid, Record, Send
from ...protocol.server_side.open_round import Ending
from ...protocol.wire.codec import decode
from ...protocol.wire.documents import Announcement, parse
from ...protocol.wire.messages import Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from .observer import ServerState, Turn
from .quick_histogram import QuickHistogram
from .refusal_reasons import GARBLED, REASONS, refusal_reason
from .state_metrics import StateCollector

__all__ = ["ServerMetrics"]

PHASES: Final = ("saliency", "train", "evaluate")
_CLOSINGS: Final = {"mask": "saliency", "update": "train", "evaluation": "evaluate"}
_ROUNDS_KEPT: Final = 16
_WAITS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0)
_WORK_S: Final = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class _WithoutBirths(CollectorRegistry):
    """A view of a registry without the ``_created`` series, which double the number of all others."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._whole = registry

    def collect(self) -> Iterator[Metric]:
        """What the registry collects, less these."""
        for family in self._whole.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class ServerMetrics:
    """Watches a server; see :class:`~.observer.Telemetry`.

    Attributes:
        registry: What is exported.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._state: Callable[[], ServerState] | None = None
        self._announced: OrderedDict[int, tuple[str, float]] = OrderedDict()
        self._loss, self._weight, self._peak_kib = 0.0, 0, 0
        self._is_closing = False
        ProcessCollector(registry=registry)
        registry.register(StateCollector(self._current))

        def counter(name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
            made = Counter(f"fedzo_{name}", text, [label] if label else [], registry=registry)
            for value in values:  # from the start, so that the first event is an increase
                made.labels(value)
            return made

        def histogram(name: str, text: str, buckets: tuple[float, ...], label: str = "") -> QuickHistogram:
            made = QuickHistogram(f"fedzo_{name}", text, buckets, label, PHASES if label else ("",))
            registry.register(made)
            return made

        verdicts = tuple(verdict.name.lower() for verdict in Verdict)
        declines = tuple(decline.name.lower() for decline in Decline if decline is not Decline.NONE)
        self._announcements = counter("announcements_total", "Rounds announced.", "phase", PHASES)
        self._closed = counter("rounds_total", "Rounds closed.", "phase", PHASES)
        endings = get_args(Ending)
        self._endings = counter("round_endings_total", "Rounds by what they had come to.", "ending", endings)
        self._reports = counter("reports_total", "Reports by what became of them.", "verdict", verdicts)
        self._refusals = counter(
            "refusals_total", "Refused reports, the first of a device in a round, by reason.", "reason", REASONS
        )
        self._declines = counter(
            "declined_reports_total", "Accepted reports without scalars, by reason.", "reason", declines
        )
        self._queries = counter("queries_total", "Forward passes of devices, in accepted reports.")
        self._enrolments = counter("enrolments_total", "Devices enrolled by this process.")
        self._records = counter("journal_entries_total", "Entries made durable.")
        self._connects = counter("broker_connects_total", "Connections to the broker.")
        self._arrival = histogram(
            "report_arrival_seconds", "From the announcement of a round to an accepted report.", _WAITS_S, "phase"
        )
        self._round = histogram("round_seconds", "From the announcement of a round to its end.", _WAITS_S, "phase")
        self._computing = histogram("device_seconds", "What devices say that a report took them.", _WAITS_S, "phase")
        self._commit = histogram("commit_seconds", "Making a turn's entries durable.", _WORK_S)
        self._closing = histogram("close_seconds", "Turns that closed a round, from decision to sending.", _WORK_S)
        self._turn = histogram("turn_seconds", "Turns of the server's loop.", _WORK_S)

        self._labels: dict[str, str] = {}

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            self._labels |= {f"fedzo_{name}": label for label in labels}
            return Gauge(f"fedzo_{name}", text, labels, registry=registry)

        self._training_loss = gauge("training_loss", "Mean loss in the reports of the latest training round.")
        self._rate = gauge("learning_rate", "Of the latest update.")
        self._accuracy = gauge("accuracy_ratio", "Held-out accuracy of the latest evaluation.", "on")
        self._evaluation_loss = gauge("evaluation_loss", "Held-out loss of the latest evaluation.", "on")
        self._peak = gauge("device_peak_bytes", "Largest peak of resident memory that a device reported.")

    def described(self) -> list[tuple[str, str, str, str]]:
        """Name, kind, label and meaning of everything that is exported, for documentation."""
        rows = []
        families = [*StateCollector(lambda: None).describe(), *self.registry.collect()]
        for family in {family.name: family for family in reversed(families)}.values():
            names = [name for sample in family.samples[:1] for name in sample.labels if name != "le"]
            label = self._labels.get(family.name) or next(iter(getattr(family, "_labelnames", ()) or names), "")
            if family.name.startswith("fedzo_"):
                suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
                rows.append((f"{family.name}{suffix}", family.type, label, family.documentation))
        return sorted(rows)

    def attach(self, state: Callable[[], ServerState]) -> None:
        """From now on the gauges are of this server.

        Args:
            state: Gives its state on any thread.
        """
        self._state = state

    def _current(self) -> ServerState | None:
        return None if self._state is None else self._state()

    def turn(self, turn: Turn) -> None:
        """See :meth:`.observer.Telemetry.turn`."""
        reports = {}
        for event in turn.events:
            if isinstance(event, Connected):
                self._connects.inc()
            elif isinstance(event, DeviceSaid) and isinstance(event.message, Report):
                reports[event.device, event.message.round] = event.message
        records, closed = 0, False
        taken: list[Report] = []
        verdicts: dict[Verdict, int] = {}
        for command in turn.commands:
            if isinstance(command, Record):
                records += 1
                closed |= command.kind == "close"
                if command.kind == "report":
                    report = reports.get((command.device, command.round))
                    taken += [report] if report is not None else []
                    continue
                if taken:  # what was accepted before a round closed is of that round
                    self._accepted(taken, turn)
                    taken = []
                self._recorded(command, turn)
            elif isinstance(command, Send) and isinstance(command.message, Receipt):
                verdict = command.message.verdict
                verdicts[verdict] = verdicts.get(verdict, 0) + 1
        self._accepted(taken, turn)
        for verdict, count in verdicts.items():
            self._reports.labels(verdict.name.lower()).inc(count)
        self._turn.observe(turn.ended - turn.began)
        if records:
            self._records.inc(records)
            self._commit.observe(turn.committed - turn.decided)
        if closed:
            self._closing.observe(turn.ended - turn.began)

    def _accepted(self, reports: Sequence[Report], turn: Turn) -> None:
        """Thousands at a time: everything is added up before a metric is touched."""
        queries, declined = 0, dict[Decline, int]()
        for report in reports:
            phase, announced_at = self._announced.get(report.round, ("", 0.0))
            if phase:
                self._arrival.observe(turn.began - announced_at, phase)
                self._computing.observe(report.elapsed_ms / 1e3, phase)
            queries += report.queries
            self._peak_kib = max(self._peak_kib, report.peak_rss_kib)
            if report.decline is not Decline.NONE:
                declined[report.decline] = declined.get(report.decline, 0) + 1
            elif report.kind is ReportKind.PROBE:
                self._loss += report.mean_loss * report.samples
                self._weight += report.samples
        if reports:
            self._queries.inc(queries)
            self._peak.set(1024 * self._peak_kib)
        for decline, count in declined.items():
            self._declines.labels(decline.name.lower()).inc(count)

    def _recorded(self, record: Record, turn: Turn) -> None:
        if record.kind == "announce":
            phase = parse(Announcement, record.payload).phase
            if phase in PHASES:
                self._announcements.labels(phase).inc()
                self._announced[record.round] = phase, turn.ended
                self._loss, self._weight = 0.0, 0
            if len(self._announced) > _ROUNDS_KEPT:
                self._announced.popitem(last=False)
        elif record.kind == "enrolment":
            self._enrolments.inc()
        elif record.kind == "refusal":
            self._refusals.labels(refusal_reason(record.payload.decode(errors="replace"))).inc()
        elif record.kind == "garbled":
            self._refusals.labels(GARBLED).inc()
        elif record.kind == "close":
            self._is_closing = True  # what it gave is the next entry, if it gave something
            self._endings.labels(Closing.decode(record.payload).ending).inc()
        elif record.kind in _CLOSINGS:
            self._ended(record, _CLOSINGS[record.kind], turn)

    def _ended(self, record: Record, phase: str, turn: Turn) -> None:
        if self._is_closing:  # else it is a mask that needs no round
            self._closed.labels(phase).inc()
            _, announced_at = self._announced.get(record.round, ("", None))
            if announced_at is not None:
                self._round.observe(turn.decided - announced_at, phase)
        self._is_closing = False
        if record.kind == "update":
            if self._weight:
                self._training_loss.set(self._loss / self._weight)
            update = decode(record.payload)
            if isinstance(update, UpdateRecord):
                self._rate.set(update.learning_rate)
        elif record.kind == "evaluation":
            found = json.loads(record.payload)
            for where, prefix in (("devices", ""), ("server", "server_")):
                if found[f"{prefix}accuracy"] is not None:
                    self._accuracy.labels(where).set(found[f"{prefix}accuracy"])
                    self._evaluation_loss.labels(where).set(found[f"{prefix}loss"])

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The body of an answer to a scrape, and its content type.

        Args:
            accept: The request's ``Accept`` header.
        """
        encode, content_type = choose_encoder(accept)
        return encode(_WithoutBirths(self.registry)), content_type
