"""Losses of weights that differ behind a cut only, from stored features of one batch.

One pass through the layers in front of the cut (``prefix.onnx``) serves any number of passes through those behind it
(``suffix.onnx``): for LeNet-5 a pass from the features takes 14 % of the multiplications and moves 96 % of the
weights. After the feature reuse of DeepZero (Chen et al., arXiv 2310.02025, section 4).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ArtifactError
from .engine import Engine
from .loss import mean_loss
from .ort import mapped_error, release_arena

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Suffix"]


class Suffix:
    """The layers behind the cut, for one batch and one set of weights in front of it.

    A context: inside it ``suffix.onnx`` is loaded and the engine's own graphs should not be used, since one graph at a
    time is what the memory plan counts. Not safe for use from two threads at once.

    Args:
        engine: Gives artifact, mask, limits and the buffers of weights.
        weights: ``float32[n_survivors]``, read only; what lies in front of the cut holds for all losses.
        x: ``float32[n, *input_shape]``.
        y: ``int64[n]``.

    Attributes:
        first: Survivors in front of the cut: a suffix's weights are ``weights[first:]``.
        features: ``float32[n, *feature_shape]``, owned by this object.
        weights_feed: ``float32[n_survivors - first]``, the buffer that the graph reads: a view of the engine's. A
            caller may write perturbed weights into it and pass it to :meth:`loss`, which saves a copy.

    Raises:
        ArtifactError: The artifact has no cut.
        DataError: The batch has another shape than the artifact's inputs.
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """

    def __init__(
        self, engine: Engine, weights: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]
    ) -> None:
        cut, mask = engine.artifact.manifest.cut, engine.mask
        if cut is None:
            raise ArtifactError(
                f"{engine.artifact.source} has no graphs that start from stored features",
                hint="export it again; a model whose layers cannot be separated has no cut",
            )
        self._x, self._y = engine.checked_batch(x, y)
        self._engine, self._cut = engine, cut
        counts = mask.counts()
        self.first = int(counts[: cut.first_parameter].sum())
        self._index = np.ascontiguousarray(mask.index(), dtype=np.int32)
        self._counts = np.ascontiguousarray(counts, dtype=np.int64)
        self.weights_feed = engine.weights_feed[self.first :]
        self.features: NDArray[np.float32] = np.empty((len(self._x), *cut.feature_shape), np.float32)
        np.copyto(engine.weights_feed, weights)
        self._fill_features()
        self._session: Any = engine.open_session("suffix.onnx")
        self._loss = np.zeros((), np.float64)
        self._bindings = [self._suffix_binding(start) for start in self._starts()]

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
        total = 0.0
        for binding in self._bindings:
            self._run(self._session, binding, "suffix.onnx")
            total += float(self._loss)
        self._engine.sample_passes += len(self._x) * self._cut.suffix_share
        return mean_loss(total, len(self._x))

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

    def _starts(self) -> range:
        return range(0, len(self._x), self._engine.micro_batch)

    def _fill_features(self) -> None:
        session = self._engine.open_session("prefix.onnx")
        binding: Any = None
        for start in self._starts():
            binding = session.io_binding()
            rows = slice(start, start + self._engine.micro_batch)
            self._bind_weights(session, binding, 0, self._cut.first_parameter)
            _bind(binding, "x", self._x[rows])
            part = self.features[rows]
            binding.bind_output("features", "cpu", 0, np.float32, list(part.shape), part.ctypes.data)
            self._run(session, binding, "prefix.onnx")
        self._engine.sample_passes += len(self._x) * (1.0 - self._cut.suffix_share)
        del session, binding  # both hold on to the arena
        release_arena()

    def _suffix_binding(self, start: int) -> Any:
        binding = self._session.io_binding()
        rows = slice(start, start + self._engine.micro_batch)
        self._bind_weights(self._session, binding, self._cut.first_parameter, self._counts.size)
        _bind(binding, "features", self.features[rows])
        _bind(binding, "y", self._y[rows])
        binding.bind_output("loss_sum", "cpu", 0, np.float64, [], self._loss.ctypes.data)
        return binding

    def _bind_weights(self, session: Any, binding: Any, first: int, stop: int) -> None:
        """Bind the part of the weights that belongs to some parameters; the survivors of each half lie together."""
        begin, end = int(self._counts[:first].sum()), int(self._counts[:stop].sum())
        feeds: dict[str, NDArray[Any]] = {
            "w": self._engine.weights_feed[begin:end],
            "index": self._index[begin:end],
            "counts": self._counts[first:stop],
        }
        for entry in session.get_inputs():
            if entry.name in feeds:
                _bind(binding, entry.name, feeds[entry.name])

    def _run(self, session: Any, binding: Any, name: str) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise mapped_error(error, f"{name} failed on a batch of {len(self._x)} samples") from error


def _bind(binding: Any, name: str, value: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)
