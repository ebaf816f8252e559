"""One loaded graph and the buffers that it reads and writes in place."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ArtifactError
from .ort import mapped_error
from .variants import BlockedWeights

__all__ = ["BoundGraph"]

_OUTPUTS: Final = {
    "probe.onnx": "loss_sum",
    "predict.onnx": "logits",
    "saliency.onnx": "logits",
    "moments.onnx": "moments",
}


class BoundGraph:
    """One session with its bindings.

    Args:
        name: The portable graph that it is, or that it is a variant of.
        session: An ``InferenceSession``.
        feeds: Buffers by input name, bound once; they must outlive the graph and not move.
        n_outputs: Length of the output of ``moments.onnx``.
        blocked: The weight tensors of a variant; they are bound as well.
        queries: Sets of weights in one run of ``probe.onnx``, and length of its output if above 1.

    Raises:
        ArtifactError: The session has inputs or outputs that no such graph has.
    """

    def __init__(
        self,
        name: str,
        session: Any,
        feeds: Mapping[str, NDArray[Any]],
        n_outputs: int,
        blocked: BlockedWeights | None = None,
        queries: int = 1,
    ) -> None:
        self.name = name
        self.queries = queries
        self.blocked = blocked
        self._session = session
        self._binding = session.io_binding()
        self._addresses: dict[str, tuple[int, int]] = {}
        self._batch: tuple[weakref.ref[NDArray[np.float32]], weakref.ref[NDArray[np.int64]]] | None = None
        wanted = {entry.name for entry in session.get_inputs()}
        bound: Mapping[str, NDArray[Any]] = feeds if blocked is None else blocked.feeds
        unknown = wanted - set(bound) - {"x", "y", "shift"}
        if unknown or "x" not in wanted or [o.name for o in session.get_outputs()] != [_OUTPUTS[name]]:
            raise ArtifactError(
                f"{name} has inputs {sorted(wanted)} and outputs {[o.name for o in session.get_outputs()]}",
                hint="it was not written by this version of fedzo: export again",
            )
        for key in wanted & set(bound):
            self._bind(key, bound[key])
        dtype = np.float64 if name == "probe.onnx" else np.float32
        shape = () if queries == 1 else (queries,)
        self.output: NDArray[Any] = np.zeros(shape if name == "probe.onnx" else n_outputs, dtype=dtype)
        if _OUTPUTS[name] != "logits":
            self._bind_output(self.output)

    def write(self, weights: NDArray[np.float32]) -> None:
        """Put the weights of a variant into its tensors, see :meth:`~.variants.BlockedWeights.write`."""
        if self.blocked is not None:
            self.blocked.write(weights)

    def holds(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> bool:
        """Whether these very arrays, as a whole, were checked and are bound: then :meth:`run_again` reads them."""
        return self._batch is not None and self._batch[0]() is x and self._batch[1]() is y

    def keep(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
        """Note that the latest run read ``x`` and ``y`` in place, without keeping them alive."""
        self._batch = weakref.ref(x), weakref.ref(y)

    def run_again(self) -> None:
        """Run on what is bound."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise mapped_error(error, f"{self.name} failed") from error

    def run(self, x: NDArray[np.float32], y: NDArray[np.int64] | None, out: NDArray[np.float32] | None) -> None:
        """Run once; the result is in ``output``, or in ``out`` for graphs with one row a sample."""
        self._batch = None
        self._bind("x", x)
        if y is not None:
            self._bind("y", y)
        if out is not None:
            self._bind_output(out)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise mapped_error(error, f"{self.name} failed on {len(x)} samples") from error

    def bind_shift(self, shift: NDArray[np.float32]) -> None:
        """Let ``saliency.onnx`` read ``shift``, which must live until the next run has ended."""
        self._bind("shift", shift)

    def _bind(self, key: str, value: NDArray[Any]) -> None:
        address = (value.ctypes.data, value.size)
        if self._addresses.get(key) != address:
            self._binding.bind_input(key, "cpu", 0, value.dtype.type, list(value.shape), address[0])
            self._addresses[key] = address

    def _bind_output(self, value: NDArray[Any]) -> None:
        name = _OUTPUTS[self.name]
        self._binding.bind_output(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)
