"""Forward passes on a board: losses, logits and moments of the surviving weights.

Every graph takes the survivors as one flat input, so a new set of weights costs one copy and no session. Inputs and
outputs are bound to numpy buffers once and changed in place, which ONNX Runtime sees without a copy. Batches are cut
into micro-batches; sums over them are kept in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.errors import ArtifactError, ConfigError, DataError
from ...protocol.pruning.mask import Mask
from ..planning.memory import arena_bytes_of
from ..storage.artifact import Artifact
from .bound_graph import BoundGraph
from .known_answer import golden_difference, wrong_answer
from .layout_choice import LayoutChoice, chosen_variant
from .loss import NonFiniteLossError, mean_loss, scored
from .ort import CPU, open_session, release_arena, sessions_stay
from .query_batches import QueriesChoice, QueryBatches
from .variants import BlockedWeights
from .weight_feeds import WeightFeeds

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Engine", "LayoutChoice", "NonFiniteLossError"]

_log = logging.getLogger(__name__)


class Engine:
    """Evaluates one artifact under one mask.

    One graph is loaded at a time unless sessions stay: asking for another one closes the first, so the memory of a
    phase is that of its own graph. Making a session takes milliseconds. Not safe for use from two threads at once.

    Attributes:
        artifact: What is evaluated.
        mask: Which entries of the flat vector survive.
        micro_batch: Largest number of samples of one run of a graph.
        threads: Threads within an operator.
        query_batches: Evaluates several sets of weights in one run.
        feeds: What the graphs read; filled from the survivors by whoever runs one.
        weights_feed: Its ``float32[n_survivors]``. A caller may compute perturbed weights straight into it and pass it
            back as ``weights``, which saves a copy. Owned by the engine.
        sample_passes: Samples sent through a graph so far; a part of the network counts by its multiplications.
    """

    def __init__(
        self,
        artifact: Artifact,
        mask: Mask,
        *,
        threads: int = 1,
        micro_batch: int = 32,
        arena_bytes: int | None = None,
        providers: Sequence[str] = (CPU,),
        strict_providers: bool = False,
        layout: LayoutChoice = "auto",
        queries: QueriesChoice = "auto",
    ) -> None:
        """Prepare the feeds; a graph is loaded when it is first needed.

        Args:
            artifact: A checked artifact.
            mask: A mask of the artifact's layout.
            threads: Threads within an operator, at least 1.
            micro_batch: Largest number of samples of one run, at least 1.
            arena_bytes: Limit of ONNX Runtime's tensor memory; ``None`` for none. It does not count the feeds.
            providers: Execution providers in order of preference; unavailable ones are skipped.
            strict_providers: Raise instead of skipping.
            layout: ``portable`` runs the graphs that run everywhere. ``blocked`` computes losses with the variant of
                ``probe.onnx`` for this machine, whose losses differ in the last bits. ``auto`` takes the variant if
                the artifact holds one for this machine, it fits under ``arena_bytes`` and it passes
                :meth:`check_golden`.
            queries: Sets of weights in one run of :meth:`losses`: 1, or a number that the artifact has a graph for;
                ``auto`` measures on the first batch.

        Raises:
            ConfigError: A number is out of range, or ``layout`` is ``blocked`` and there is no variant.
            ArtifactError: ``mask`` has another layout than ``artifact``.
        """
        if threads < 1 or micro_batch < 1 or (arena_bytes is not None and arena_bytes < 1):
            raise ConfigError(
                f"threads ({threads}), micro_batch ({micro_batch}) and arena_bytes ({arena_bytes}) must be at least 1"
            )
        if mask.layout.digest != artifact.manifest.layout.digest:
            raise ArtifactError("the mask belongs to another layout than the artifact")
        self.artifact = artifact
        self.mask = mask
        self.micro_batch = micro_batch
        self.sample_passes: float = 0
        self.threads = threads
        self._arena_bytes = arena_bytes
        self._providers = tuple(providers)
        self._strict = strict_providers
        self.feeds = WeightFeeds(mask, artifact.manifest.seed, len(artifact.manifest.model_layout.parameters))
        self.weights_feed = self.feeds.survivors
        self._graph: BoundGraph | None = None
        self._kept: dict[tuple[str, GraphVariant | None], BoundGraph] = {}
        self._variant = chosen_variant(self, layout)
        self._variant_required = layout == "blocked"
        self._variant_checked = False
        self.query_batches = QueryBatches(self, queries)

    @property
    def n_survivors(self) -> int:
        """Length of a weight vector."""
        return int(self.weights_feed.size)

    @property
    def arena_bytes(self) -> int | None:
        """Limit of ONNX Runtime's tensor memory."""
        return self._arena_bytes

    @property
    def layout(self) -> Literal["portable", "blocked"]:
        """What losses are computed with. It turns to ``portable`` when the variant fails its check."""
        return "portable" if self._variant is None else "blocked"

    def loss(self, weights: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """Mean cross-entropy of a batch.

        Args:
            weights: ``float32[n_survivors]``, read only.
            x: ``float32[n, *input_shape]``.
            y: ``int64[n]``.

        Raises:
            NonFiniteLossError: The weights have diverged.
            MemoryBudgetError: The tensors do not fit under ``arena_bytes``.
        """
        graph = self._open("probe.onnx")
        self._set_weights(graph, weights)
        return mean_loss(float(self.loss_sums(graph, x, y)), len(x))

    def losses(self, weights: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
        """:meth:`loss` under several ``weights float32[n, n_survivors]``: ``float64[n]``, owned by the caller.

        Several are evaluated in one run where that is quicker, see :mod:`.query_batches`.
        """
        return self.query_batches.losses(weights, x, y)

    def logits(
        self, weights: NDArray[np.float32], x: NDArray[np.float32], *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Outputs of the network: ``float32[n, n_classes]``, in ``out`` when that is given."""
        return self._rows("predict.onnx", weights, x, out)

    def shifted_logits(
        self,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        shift: NDArray[np.float32],
        *,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Outputs when a constant is added to pre-activations.

        Args:
            weights: ``float32[n_survivors]``.
            x: ``float32[n, *input_shape]``.
            shift: ``float32[n_units]``, one constant a row or channel.
            out: ``float32[n, n_classes]`` to write to.

        Returns:
            ``float32[n, n_classes]``: ``out``, or a new array.
        """
        shift = np.ascontiguousarray(shift, dtype=np.float32)
        if shift.shape != (self.artifact.manifest.n_units,):
            raise ArtifactError(f"shift has shape {shift.shape}, expected ({self.artifact.manifest.n_units},)")
        graph = self._open("saliency.onnx")
        graph.bind_shift(shift)
        return self._rows("saliency.onnx", weights, x, out)

    def moments(self, weights: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean squared inputs of the weights of every unit layer: ``float32[n_moments]``, owned by the caller."""
        x, _ = self.checked_batch(x, None)
        graph = self._open("moments.onnx")
        self._set_weights(graph, weights)
        total = np.zeros(self.artifact.manifest.n_moments, dtype=np.float64)
        for start in range(0, len(x), self.micro_batch):
            part = x[start : start + self.micro_batch]
            graph.run(part, None, None)
            total += graph.output.astype(np.float64) * len(part)
        self.sample_passes += len(x)
        return (total / len(x)).astype(np.float32)

    def evaluate(
        self,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        y: NDArray[np.int64],
        micro_batch: int | None = None,
    ) -> tuple[float, int, int]:
        """Loss and accuracy of labelled samples.

        Args:
            weights: ``float32[n_survivors]``.
            x: ``float32[n, *input_shape]``.
            y: ``int64[n]``.
            micro_batch: Samples a run, at most and by default the engine's.

        Returns:
            Sum of cross-entropies, not finite if weights have diverged; samples with the right largest logit; ``n``.
        """
        x, y = self.checked_batch(x, y)
        step = min(micro_batch or self.micro_batch, self.micro_batch)
        loss_sum, correct = 0.0, 0
        out = np.empty((step, self.artifact.manifest.n_classes), dtype=np.float32)
        for start in range(0, len(x), step):
            labels = y[start : start + step]
            logits = self.logits(weights, x[start : start + step], out=out[: len(labels)])
            losses, hits = scored(logits, labels)
            loss_sum, correct = loss_sum + losses, correct + hits
        return loss_sum, correct, len(x)

    def check_golden(self) -> float:
        """Compare the loss of the dense initial weights with the manifest's known answer.

        A variant is checked too; when it fails, losses are computed with the portable graph from then on.

        Returns:
            The absolute difference of the portable graph.

        Raises:
            SelfTestError: It is larger than the manifest's tolerance: this machine computes something else. Also if
                the variant's is and the caller asked for ``blocked``.
        """
        with self._without_mask("portable") as dense:
            difference = golden_difference(dense)
        self.check_variant()
        return difference

    def _without_mask(self, layout: LayoutChoice) -> Engine:
        """The same engine without a mask, for known answers; what this one had loaded is closed."""
        self.close()
        extra = 8 * (self.artifact.manifest.layout.size - self.feeds.n_fed)
        dense = Engine(
            self.artifact,
            Mask.dense(self.artifact.manifest.layout),
            threads=self.threads,
            micro_batch=self.micro_batch,
            arena_bytes=None if self._arena_bytes is None else self._arena_bytes + extra,
            providers=self._providers,
            strict_providers=self._strict,
            layout=layout,
            queries=1,
        )
        dense._variant_checked = True
        return dense

    def check_variant(self) -> None:
        """Drop the variant, unless there is none or it was checked, if it does not give the known answer."""
        if self._variant is None or self._variant_checked:
            return
        with self._without_mask("blocked") as dense:
            wrong = wrong_answer(dense)
        self._variant_checked = True  # not if that raises: what was not checked is not used
        if wrong is not None:
            if self._variant_required:
                raise wrong
            _log.info("losses are computed with the portable graph: %s", wrong.message)
            self._variant = None

    def open_session(self, file_name: str) -> Any:
        """A session of a graph of the artifact, in place of the one that is loaded; the caller owns it.

        Raises:
            ArtifactError: The artifact has no such graph, or its bytes were changed.
            MemoryBudgetError: It does not fit under ``arena_bytes``.
        """
        self.close()
        return open_session(
            self.artifact,
            file_name,
            threads=self.threads,
            arena_bytes=self._arena_bytes,
            providers=self._providers,
            strict_providers=self._strict,
        )

    def close(self) -> None:
        """Unload the graph and give its memory back; the engine stays usable and loads it again when needed."""
        self._kept = self._kept if sessions_stay() else {}
        if self._graph is not None:
            self._graph = None
            release_arena()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def can_open(self, variant: GraphVariant) -> bool:
        """Whether the file of ``variant`` is here, for the provider that runs it."""
        return self._providers[:1] == (CPU,) and self.artifact.holds(variant.file)

    def fits(self, variant: GraphVariant) -> bool:
        """Whether the tensors of ``variant`` fit under ``arena_bytes``."""
        sizes = (self.feeds.n_fed, self.micro_batch, self.threads)
        needed = arena_bytes_of(self.artifact.manifest, (variant.file.name,), *sizes)
        return self._arena_bytes is None or needed <= self._arena_bytes

    def _open(self, name: str) -> BoundGraph:
        if self._graph is None or self._graph.name != name or self._graph.queries > 1:
            self.close()
            if name == "probe.onnx":
                self.check_variant()
            self._graph = self._bound(name, self._variant if name == "probe.onnx" else None)
        return self._graph

    def open_variant(self, variant: GraphVariant) -> BoundGraph:
        """A graph for several queries, in place of the one that is loaded."""
        if self._graph is None or (self._graph.name, self._graph.queries) != (variant.graph, variant.queries):
            self.close()
            self._graph = self._bound(variant.graph, variant)
        return self._graph

    def _bound(self, name: str, variant: GraphVariant | None) -> BoundGraph:
        if sessions_stay() and (name, variant) in self._kept:
            return self._kept[name, variant]
        session = self.open_session(variant.file.name if variant else name)
        manifest, feeds, weights, queries = self.artifact.manifest, self.feeds, None, 1
        if variant is not None:
            queries = variant.queries
            weights = BlockedWeights.of_session(session, manifest.layout, self.mask, queries, filled=feeds.filled)
        graph = BoundGraph(name, session, feeds.inputs, manifest.n_moments, weights, queries)
        if sessions_stay():
            self._kept[name, variant] = graph
        return graph

    def loss_sums(self, graph: BoundGraph, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over a batch under the weights that ``graph`` holds: ``float64[]``, or ``float64[queries]``."""
        self.sample_passes += len(x) * graph.queries
        if graph.holds(x, y):  # another query of the same batch: nothing to check or to bind
            graph.run_again()
            return graph.output
        samples, labels = self.checked_batch(x, y)
        total = np.zeros_like(graph.output)
        for start in range(0, len(samples), self.micro_batch):
            stop = start + self.micro_batch
            graph.run(samples[start:stop], labels[start:stop], None)
            total += graph.output
        if samples is x and labels is y and len(x) <= self.micro_batch:
            graph.keep(samples, labels)
        return total

    def _rows(
        self, name: str, weights: NDArray[np.float32], x: NDArray[np.float32], out: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        x, _ = self.checked_batch(x, None)
        shape = (len(x), self.artifact.manifest.n_classes)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise DataError(f"out is {out.dtype}{list(out.shape)}, expected a contiguous float32{list(shape)}")
        graph = self._open(name)
        self._set_weights(graph, weights)
        for start in range(0, len(x), self.micro_batch):
            stop = start + self.micro_batch
            graph.run(x[start:stop], None, out[start:stop])
        self.sample_passes += len(x)
        return out

    def _set_weights(self, graph: BoundGraph, weights: NDArray[np.float32]) -> None:
        self.feeds.check(weights)
        if graph.blocked is not None:
            graph.blocked.write(weights)
        else:
            self.feeds.write(weights)

    def checked_batch(self, x: NDArray[Any], y: NDArray[Any] | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """A batch as the graphs take it; copied only if it has another type or order in memory.

        Raises:
            DataError: It has another shape than the artifact's inputs, or another number of labels than samples.
        """
        shape = self.artifact.manifest.input_shape
        if x.shape[1:] != shape or len(x) < 1:
            raise DataError(
                f"the batch has shape {x.shape}, expected (n, {', '.join(map(str, shape))}) with n >= 1",
                hint="load the data with load_dataset, which converts and checks them",
            )
        labels = np.zeros(0, dtype=np.int64) if y is None else np.ascontiguousarray(y, dtype=np.int64)
        if y is not None and labels.shape != (len(x),):
            raise DataError(f"the labels have shape {labels.shape}, expected ({len(x)},)")
        return np.ascontiguousarray(x, dtype=np.float32), labels
