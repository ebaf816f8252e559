"""A histogram for the server's loop: a fleet's reports come by the thousand, and all at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["QuickHistogram"]


class QuickHistogram(Collector):
    """Counts values in buckets; the client library's own takes a lock for every value, here one thread writes.

    Args:
        name: Of the metric.
        text: Its help.
        buckets: Upper bounds, ascending.
        label: Name of the one label; empty for none.
        values: Of the label.
    """

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], label: str = "", values: Sequence[str] = ("",)
    ) -> None:
        self._name, self._text, self._label, self._bounds = name, text, label, tuple(buckets)
        self._counts = {value: [0] * (len(buckets) + 1) for value in values}
        self._sums = dict.fromkeys(values, 0.0)

    def observe(self, value: float, label: str = "") -> None:
        """Count a value."""
        self._counts[label][bisect_left(self._bounds, value)] += 1
        self._sums[label] += value

    def describe(self) -> Iterator[Metric]:
        """What there will be."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """What there is; a scrape in the middle of a turn may see a part of it."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for label, counts in self._counts.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, self._bounds), "+Inf"), list(counts), strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([label] if self._label else [], buckets, self._sums[label])
        yield family
