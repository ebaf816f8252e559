"""The graphs of a network's stages, on one batch: which part of the weights each of them reads, and what it yields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.stages import Stage, StageHead
from .cut_graphs import bind_input, bind_output, run_bound
from .engine import Engine
from .ort import release_arena

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StageRun", "StageWeights", "rows_of", "stage_bytes"]


class StageWeights:
    """One stage's part of an engine's weights.

    Args:
        engine: Gives artifact, mask and the buffers of weights.
        stage: The stage.

    Attributes:
        survivors: Where its survivors lie in a vector of all of them.
        places: ``int64[n]``, where each of them lies among the stage's dense parameters.
        size: Entries of these.
        head: ``float32[head size]``, the engine's buffer of its head's weights; None if it has no head.
        head_survivors: Where they lie in a vector of all survivors; empty if there is no head.
    """

    def __init__(self, engine: Engine, stage: Stage) -> None:
        layout, counts = engine.artifact.manifest.layout, engine.mask.counts()
        first, end = stage.first_parameter, stage.end_parameter
        self.survivors = _piece(counts, first, end)
        last = layout.slice_of(end - 1)
        kept = engine.mask.kept[layout.offsets[first] : last.stop]
        self.places = np.flatnonzero(kept)
        self.size = int(kept.size)
        self.head_survivors = _head_piece(counts, stage.head)
        self.head = engine.weights_feed[self.head_survivors] if stage.head else None
        inputs = engine.feeds.inputs
        entries = _piece(inputs["counts"], first, end)
        self._feeds = {
            "w": inputs["w"][entries],
            "index": inputs["index"][entries],
            "counts": inputs["counts"][first:end],
        }

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Inputs ``w``, ``index``, ``counts`` and ``head`` of a graph of this stage: views of the engine's buffers."""
        return self._feeds if self.head is None else {**self._feeds, "head": self.head}


class StageRun:
    """One graph on one batch, micro-batch by micro-batch, with buffers that may be changed between runs.

    Args:
        engine: Gives artifact and limits; a graph that it has loaded is closed.
        name: File name of the graph.
        fixed: Inputs that all micro-batches share; the graph takes those that it knows.
        rows: Inputs of a row a sample, ``[batch, ...]``.
        outputs: Outputs of a row a sample.
        sums: Outputs that are sums over the samples, ``float32[n]``; :meth:`run` adds the micro-batches up in order.

    All buffers belong to the caller and must not move while this object is open.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        fixed: Mapping[str, NDArray[Any]],
        rows: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        sums: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        self._name, self._sums = name, dict(sums or {})
        self._parts = {key: np.zeros_like(value) for key, value in self._sums.items()}
        self._session: Any = engine.open_session(name)
        self._bindings: list[Any] = []
        known = {entry.name for entry in self._session.get_inputs()}
        n = len(next(iter(rows.values())))
        for start in range(0, n, engine.micro_batch):
            piece = slice(start, start + engine.micro_batch)
            binding = self._session.io_binding()
            for key, value in fixed.items():
                if key in known:
                    bind_input(binding, key, value)
            for key, value in rows.items():
                bind_input(binding, key, value[piece])
            for key, value in outputs.items():
                bind_output(binding, key, value[piece])
            for key, part in self._parts.items():
                bind_output(binding, key, part)
            self._bindings.append(binding)

    def run(self) -> None:
        """One pass over the batch.

        Raises:
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        for total in self._sums.values():
            total.fill(0.0)
        for binding in self._bindings:
            run_bound(self._session, binding, self._name)
            for key, part in self._parts.items():
                self._sums[key] += part

    def close(self) -> None:
        """Unload the graph and give its memory back."""
        self._session, self._bindings = None, []
        release_arena()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows_of(batch: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``float32[batch, *shape]`` to be written."""
    return np.empty((batch, *shape), np.float32)


def stage_bytes(stages: tuple[Stage, ...], batch: int, copies: int) -> int:
    """Bytes of what a batch needs in the stage where that is most: its input, and so many arrays like its output.

    The first stage's input is the batch itself.
    """
    sizes = [math.prod(s.feature_shape) * bool(s.number) + copies * math.prod(s.output_shape) for s in stages]
    return 4 * batch * max(sizes, default=0)


def _piece(counts: NDArray[np.int64], first: int, end: int) -> slice:
    return slice(int(counts[:first].sum()), int(counts[:end].sum()))


def _head_piece(counts: NDArray[np.int64], head: StageHead | None) -> slice:
    return _piece(counts, head.weight, head.bias + 1) if head else slice(0, 0)
