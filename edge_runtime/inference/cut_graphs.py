"""The two halves of a network that is cut: which part of the weights each of them reads, and the features between."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.cut import Cut
from .engine import Engine
from .ort import mapped_error, release_arena

__all__ = ["CutWeights", "bind_input", "bind_output", "run_bound"]


class CutWeights:
    """The weights of an engine, as the halves of its network read them.

    Survivors lie in the order of the layout, so each half reads one piece of the engine's buffer in place.

    Args:
        engine: Gives artifact, mask, limits and the buffer of weights.
        cut: Where its network is cut.

    Attributes:
        index: ``int32[n_survivors]``, each survivor's place inside its own parameter.
        counts: ``int64[n_parameters]``, survivors of each.
        first: Survivors in front of the cut; those behind it are ``weights[first:]``.
    """

    def __init__(self, engine: Engine, cut: Cut) -> None:
        self._engine, self._cut = engine, cut
        inputs, mask = engine.feeds.inputs, engine.mask
        is_filled = engine.feeds.filled is not None
        self.index: NDArray[np.int32] = mask.index() if is_filled else inputs["index"]
        self.counts: NDArray[np.int64] = mask.counts() if is_filled else inputs["counts"]
        self.first = int(self.counts[: cut.first_parameter].sum())
        self._first_fed = int(inputs["counts"][: cut.first_parameter].sum())

    @property
    def behind(self) -> NDArray[np.float32]:
        """``float32[n_survivors - first]``: the engine's buffer behind the cut; see :meth:`show_behind`."""
        return self._engine.weights_feed[self.first :]

    def show_behind(self) -> None:
        """Let the graph behind the cut see what was written to :attr:`behind`."""
        self._engine.feeds.show(self.first)

    def bind_front(self, session: Any, binding: Any) -> None:
        """Let a graph in front of the cut read its part."""
        self._bind(session, binding, self._feeds(slice(0, self._first_fed), slice(0, self._cut.first_parameter)))

    def bind_behind(self, session: Any, binding: Any) -> None:
        """Let a graph behind the cut read its part."""
        self._bind(session, binding, self.feeds_behind())

    def feeds_behind(self) -> dict[str, NDArray[Any]]:
        """Inputs ``w``, ``index`` and ``counts`` of a graph behind the cut: views of the engine's buffers."""
        return self._feeds(slice(self._first_fed, None), slice(self._cut.first_parameter, None))

    def features(self, file_name: str, weights: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What crosses the cut; a graph that the engine has loaded is closed.

        Args:
            file_name: Graph in front of the cut.
            weights: ``float32[n_survivors]``, copied into the engine's buffer.
            x: ``float32[n, *input_shape]``, checked.

        Returns:
            ``float32[n, *feature_shape]``, owned by the caller.

        Raises:
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        engine = self._engine
        engine.feeds.write(weights)
        out: NDArray[np.float32] = np.empty((len(x), *self._cut.feature_shape), np.float32)
        session = engine.open_session(file_name)
        binding: Any = None
        for start in range(0, len(x), engine.micro_batch):
            binding = session.io_binding()
            self.bind_front(session, binding)
            bind_input(binding, "x", x[start : start + engine.micro_batch])
            bind_output(binding, "features", out[start : start + engine.micro_batch])
            run_bound(session, binding, file_name)
        engine.sample_passes += len(x) * (1.0 - self._cut.suffix_share)
        del session, binding  # both hold on to the arena
        release_arena()
        return out

    def _feeds(self, entries: slice, parameters: slice) -> dict[str, NDArray[Any]]:
        inputs = self._engine.feeds.inputs
        return {
            "w": inputs["w"][entries],
            "index": inputs["index"][entries],
            "counts": inputs["counts"][parameters],
        }

    def _bind(self, session: Any, binding: Any, feeds: dict[str, NDArray[Any]]) -> None:
        for entry in session.get_inputs():
            if entry.name in feeds:
                bind_input(binding, entry.name, feeds[entry.name])


def bind_input(binding: Any, name: str, value: NDArray[Any]) -> None:
    """Let a graph read ``value`` in place; it must outlive the binding and not move."""
    binding.bind_input(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)


def bind_output(binding: Any, name: str, value: NDArray[Any]) -> None:
    """Let a graph write to ``value``."""
    binding.bind_output(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)


def run_bound(session: Any, binding: Any, file_name: str) -> None:
    """Run a graph on what is bound.

    Raises:
        MemoryBudgetError: The tensors do not fit under the limit.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise mapped_error(error, f"{file_name} failed") from error
