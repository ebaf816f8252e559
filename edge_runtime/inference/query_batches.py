"""Several queries in one run of a graph, where this very device is quicker with them.

Small networks gain: what all queries share is computed once, and fewer lanes of the kernels lie idle. Whether it pays
depends on processor, release, batch and threads, so it is measured on the first batch: a few timed runs of both forms,
then the quicker one stays. Where a query takes seconds, one timed run of each must do.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.artifact.layout import initial_weights
from ...protocol.errors import ConfigError, FedzoError, SelfTestError
from ...protocol.perturbation.buffers import aligned_zeros
from .loss import mean_loss
from .variants import wanted_variants

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["QueriesChoice", "QueryBatches"]

QueriesChoice = Literal["auto"] | int
"""Queries in one run: ``auto`` measures, 1 never takes more, another number must be one that the artifact holds."""

TIMED_RUNS: Final = 7
TIMED_S: Final = 0.5
"""No further run is timed after this: nothing can cancel the comparison, and slow boards have the clearest times."""

LEAST_GAIN: Final = 0.03
"""Part of a query that must be saved: less is lost again when the number of queries is no multiple."""

TOLERANCE: Final = 1e-5
"""Relative difference of losses above which a graph is not used, as for the known answer."""

_log = logging.getLogger(__name__)


class QueryBatches:
    """How one engine evaluates several queries.

    Args:
        engine: Whose graphs and weights are used.
        choice: See :data:`QueriesChoice`.

    Raises:
        ConfigError: ``choice`` is a number above 1 and the artifact holds no such graph for this machine, or one that
            needs more memory than the engine may take.
    """

    def __init__(self, engine: Engine, choice: QueriesChoice) -> None:
        # Engine and this refer to each other: without the collector's help neither would give its weights back.
        self._engine: Engine = weakref.proxy(engine)
        self._forced = choice != "auto"
        # Not the one that is used: that is only set when its losses have been compared.
        self._undecided = None if choice == 1 else self._candidate(choice)
        self._variant: GraphVariant | None = None
        self._feeds: NDArray[np.float32] | None = None

    def chosen(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> int:
        """Queries in one run for batches like this one; decided when it is first asked.

        Raises:
            SelfTestError: The choice is forced, and the graph gives other losses than single queries.
        """
        if (candidate := self._undecided) is not None:
            if not self._forced:
                self._undecided = None  # however it ends, it is not tried again
            micro_batch = self._engine.micro_batch
            self._variant = self._better(candidate, x[:micro_batch], y[:micro_batch])
            self._undecided = None
        return 1 if self._variant is None else self._variant.queries

    def feeds(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float32]:
        """Room for the weights of one run, ``float32[chosen, n_survivors]``, owned by the engine.

        A caller computes weights straight into it and passes the first rows on to :meth:`losses`.
        """
        queries, size = self.chosen(x, y), self._engine.n_survivors
        if queries == 1:
            return self._engine.weights_feed[np.newaxis]
        if self._feeds is None:
            self._feeds = aligned_zeros(queries * size).reshape(queries, size)
        return self._feeds

    def losses(self, weights: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`~.engine.Engine.losses`."""
        if weights.ndim != 2 or weights.shape[1] != self._engine.n_survivors or weights.dtype != np.float32:
            shape = f"{weights.dtype}{list(weights.shape)}"
            raise ConfigError(f"weights are {shape}, this mask needs float32[n, {self._engine.n_survivors}]")
        out = np.empty(len(weights), np.float64)
        if self.chosen(x, y) == 1 or self._variant is None:
            feed = self._engine.weights_feed
            for row, values in enumerate(weights):
                own = values.ctypes.data == feed.ctypes.data
                out[row] = self._engine.loss(feed if own else values, x, y)
            return out
        graph = self._engine.open_variant(self._variant)
        for start in range(0, len(weights), graph.queries):
            rows = weights[start : start + graph.queries]
            graph.write(rows)  # the tensors of further queries keep what they had
            for row, total in enumerate(self._engine.loss_sums(graph, x, y)[: len(rows)].tolist()):
                out[start + row] = mean_loss(total, len(x))
        return out

    def _candidate(self, choice: QueriesChoice) -> GraphVariant | None:
        engine = self._engine
        manifest = engine.artifact.manifest
        wanted = [v for v in wanted_variants(manifest) if v.queries > 1] if engine.layout == "blocked" else []
        wanted += [v for v in manifest.variants if v.machine == "any"]
        fitting = [v for v in wanted if engine.can_open(v) and engine.fits(v) and (choice in ("auto", v.queries))]
        if not fitting and choice != "auto":
            raise ConfigError(
                f"{engine.artifact.source} has no graph for {choice} queries in one run that fits here",
                hint="leave the number of queries to the device, or export again",
            )
        return fitting[0] if fitting else None

    def _better(self, variant: GraphVariant, x: NDArray[np.float32], y: NDArray[np.int64]) -> GraphVariant | None:
        """``variant`` if it is right and worth it; the weights that a caller left in the feed stay."""
        feed = self._engine.weights_feed
        try:
            kept = feed.copy()
            try:
                single, batched = self._compared(variant, x, y)
            finally:
                np.copyto(feed, kept)
        except Exception as error:  # also when no memory is left: single queries need less
            self._engine.close()
            if self._forced:
                raise
            _log.info("one query a run: %s", error.message if isinstance(error, FedzoError) else repr(error))
            return None
        name, samples = variant.file.name, len(x)
        _log.info(
            "%s: a query of %d samples takes %.3f ms alone, %.3f ms as one of %d in a run",
            *(name, samples, 1e3 * single, 1e3 * batched, variant.queries),
        )
        if not self._forced and batched > (1 - LEAST_GAIN) * single:
            self._engine.close()
            return None
        return variant

    def _compared(self, variant: GraphVariant, x: NDArray[np.float32], y: NDArray[np.int64]) -> tuple[float, float]:
        """Seconds of a query alone and of one in a run of several, after a look at whether the losses agree."""
        engine = self._engine
        manifest = engine.artifact.manifest
        start = initial_weights(manifest.layout, manifest.seed)[engine.mask.survivors()]
        weights = np.multiply.outer(np.linspace(1.0, 0.5, variant.queries, dtype=np.float32), start)
        expected = np.array([engine.loss(row, x, y) for row in weights])
        single = self._seconds(lambda: engine.loss(engine.weights_feed, x, y))
        graph = engine.open_variant(variant)
        graph.write(weights)
        found = engine.loss_sums(graph, x, y) / len(x)
        difference = float(np.max(np.abs(found - expected)))
        if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
            raise SelfTestError(
                f"{variant.file.name} gives losses that differ by {difference:.2e} from single queries",
                hint="export again; if it stays, use one query a run",
            )
        return single, self._seconds(lambda: engine.loss_sums(graph, x, y)) / variant.queries

    def _seconds(self, run: Callable[[], Any]) -> float:
        """Shortest time of a few runs: what else the machine does only makes it longer.

        The comparison of the losses before it has warmed up the graph.
        """
        clock = time.thread_time if self._engine.threads == 1 else time.perf_counter
        times: list[float] = []
        end = time.perf_counter() + TIMED_S
        while len(times) < TIMED_RUNS and (not times or time.perf_counter() < end):
            start = clock()
            run()
            times.append(clock() - start)
        return min(times)
