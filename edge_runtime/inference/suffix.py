"""Losses of weights that differ behind a cut only, from stored features of one batch.

One pass through the layers in front of the cut serves any number of passes through those behind it: for LeNet-5's one
cut a pass from the features takes 14 % of the multiplications and moves 96 % of the weights. After the feature reuse of
DeepZero (Chen et al., arXiv 2310.02025, section 4).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.cut import Cut
from ...protocol.artifact.manifest import CUT_GRAPHS
from ...protocol.errors import ArtifactError
from .cut_graphs import CutWeights, bind_input, bind_output, run_bound
from .engine import Engine
from .loss import mean_loss
from .ort import release_arena

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Suffix"]


class Suffix:
    """The layers behind the cut, for one batch and one set of weights in front of it.

    A context: inside it the graph behind the cut is loaded and the engine's own graphs should not be used, since one
    graph at a time is what the memory plan counts. Not safe for use from two threads at once.

    Args:
        engine: Gives artifact, mask, limits and the buffers of weights.
        cut: Where the layers begin.
        name: File name of their graph.
        weights: ``float32[n_survivors]``, read only.
        features: ``float32[n, *feature_shape]``, what crosses the cut; not copied.
        y: ``int64[n]``, checked.

    Attributes:
        first: Survivors in front of the cut: a suffix's weights are ``weights[first:]``.
        features: What the graph starts from.
        weights_feed: ``float32[n_survivors - first]``, the buffer that the graph reads: a view of the engine's. A
            caller may write perturbed weights into it and pass it to :meth:`loss`, which saves a copy.

    Raises:
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """

    def __init__(
        self,
        engine: Engine,
        cut: Cut,
        name: str,
        weights: NDArray[np.float32],
        features: NDArray[np.float32],
        y: NDArray[np.int64],
    ) -> None:
        self._engine, self._share, self._name, self._y = engine, cut.suffix_share, name, y
        self._weights = CutWeights(engine, cut)
        self.first, self.weights_feed = self._weights.first, self._weights.behind
        self.features = features
        np.copyto(self.weights_feed, weights[self.first :])
        self._session: Any = engine.open_session(name)
        self._loss = np.zeros((), np.float64)
        self._bindings = [self._bound(start) for start in range(0, len(y), engine.micro_batch)]

    @classmethod
    def of_cut(cls, engine: Engine, weights: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> Self:
        """The layers behind the artifact's one cut; features are computed.

        Args:
            engine: As above.
            weights: ``float32[n_survivors]``, read only.
            x: ``float32[n, *input_shape]``.
            y: ``int64[n]``.

        Raises:
            ArtifactError: The artifact has no cut.
            DataError: The batch has another shape than the artifact's inputs.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        cut = engine.artifact.manifest.cut
        if cut is None:
            raise ArtifactError(
                f"{engine.artifact.source} has no graphs that start from stored features",
                hint="export it again; a model whose layers cannot be separated has no cut",
            )
        x, y = engine.checked_batch(x, y)
        features = CutWeights(engine, cut).features(CUT_GRAPHS[0], weights, x)
        return cls(engine, cut, CUT_GRAPHS[1], weights, features, y)

    def loss(self, weights: NDArray[np.float32]) -> float:
        """Mean cross-entropy of the batch.

        Args:
            weights: ``float32[n_survivors - first]``, read only.

        Raises:
            NonFiniteLossError: The weights have diverged.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        if weights is not self.weights_feed:
            np.copyto(self.weights_feed, weights)
        self._weights.show_behind()
        total = 0.0
        for binding in self._bindings:
            run_bound(self._session, binding, self._name)
            total += float(self._loss)
        self._engine.sample_passes += len(self._y) * self._share
        return mean_loss(total, len(self._y))

    def close(self) -> None:
        """Unload the graph and give its memory back."""
        if self._session is not None:
            self._session, self._bindings = None, []
            release_arena()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bound(self, start: int) -> Any:
        binding = self._session.io_binding()
        rows = slice(start, start + self._engine.micro_batch)
        self._weights.bind_behind(self._session, binding)
        bind_input(binding, "features", self.features[rows])
        bind_input(binding, "y", self._y[rows])
        bind_output(binding, "loss_sum", self._loss)
        return binding
