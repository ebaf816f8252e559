"""Forward passes on a board: losses, logits and moments of the surviving weights.

Every graph takes the survivors as one flat input, so a new set of weights costs one copy and no session. Inputs and
outputs are bound to numpy buffers once and changed in place, which ONNX Runtime sees without a copy. Batches are cut
into micro-batches; sums over them are kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ArtifactError, ConfigError, DataError, SelfTestError
from ..protocol.layout import initial_weights
from ..protocol.manifest import golden_batch
from ..protocol.mask import Mask
from .artifact import Artifact
from .ort import CPU, mapped_error, open_session, release_arena

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Engine", "NonFiniteLossError"]

_OUTPUTS = {"probe.onnx": "loss_sum", "predict.onnx": "logits", "saliency.onnx": "logits", "moments.onnx": "moments"}


class NonFiniteLossError(ConfigError):
    """A loss is infinite or NaN: the run's learning rate or sigma lets the weights diverge.

    A class of its own because a device answers it with ``Decline.NON_FINITE`` and stays in the run.
    """


class _Graph:
    """One session with its bindings; reads the engine's feeds in place."""

    def __init__(self, name: str, session: Any, feeds: dict[str, NDArray[Any]], n_outputs: int) -> None:
        self.name = name
        self._session = session
        self._binding = session.io_binding()
        self._addresses: dict[str, tuple[int, int]] = {}
        wanted = {entry.name for entry in session.get_inputs()}
        unknown = wanted - set(feeds) - {"x", "y", "shift"}
        if unknown or "x" not in wanted or [o.name for o in session.get_outputs()] != [_OUTPUTS[name]]:
            raise ArtifactError(
                f"{name} has inputs {sorted(wanted)} and outputs {[o.name for o in session.get_outputs()]}",
                hint="it was not written by this version of fedzo: export again",
            )
        self._feeds = {key: value for key, value in feeds.items() if key in wanted}
        for key, value in self._feeds.items():
            self._bind(key, value)
        dtype = np.float64 if name == "probe.onnx" else np.float32
        self._per_sample = _OUTPUTS[name] == "logits"
        self.output: NDArray[Any] = np.zeros(() if name == "probe.onnx" else n_outputs, dtype=dtype)
        if not self._per_sample:
            self._bind_output(self.output)

    def run(self, x: NDArray[np.float32], y: NDArray[np.int64] | None, out: NDArray[np.float32] | None) -> None:
        """Run once; the result is in ``output``, or in ``out`` for graphs with one row a sample."""
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
        self._bind("shift", shift)

    def _bind(self, key: str, value: NDArray[Any]) -> None:
        address = (value.ctypes.data, value.shape[0])
        if self._addresses.get(key) != address:
            self._binding.bind_input(key, "cpu", 0, value.dtype.type, list(value.shape), address[0])
            self._addresses[key] = address

    def _bind_output(self, value: NDArray[Any]) -> None:
        name = _OUTPUTS[self.name]
        self._binding.bind_output(name, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)


class Engine:
    """Evaluates one artifact under one mask.

    At most one graph is loaded at a time: asking for another one closes the first, so the memory of a phase is that of
    its own graph. Making a session takes milliseconds. Not safe for use from two threads at once; engines are
    independent of each other.

    Attributes:
        artifact: What is evaluated.
        mask: Which entries of the flat vector survive.
        micro_batch: Largest number of samples of one run of a graph.
        weights_feed: ``float32[n_survivors]``, the buffer that the graphs read. A caller may compute perturbed weights
            straight into it and pass it back as ``weights``, which saves a copy. Owned by the engine.
        sample_passes: Samples sent through a graph so far.
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

        Raises:
            ConfigError: A number is out of range.
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
        self.sample_passes = 0
        self._threads = threads
        self._arena_bytes = arena_bytes
        self._providers = tuple(providers)
        self._strict = strict_providers
        self.weights_feed: NDArray[np.float32] = np.zeros(mask.n_survivors, dtype=np.float32)
        self._feeds: dict[str, NDArray[Any]] = {
            "w": self.weights_feed,
            "index": np.ascontiguousarray(mask.index(), dtype=np.int32),
            "counts": np.ascontiguousarray(mask.counts(), dtype=np.int64),
        }
        self._graph: _Graph | None = None

    @property
    def n_survivors(self) -> int:
        """Length of a weight vector."""
        return int(self.weights_feed.size)

    @property
    def arena_bytes(self) -> int | None:
        """Limit of ONNX Runtime's tensor memory."""
        return self._arena_bytes

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
        x, y = self._checked(x, y)
        graph = self._open("probe.onnx")
        self._set_weights(weights)
        total = 0.0
        for start in range(0, len(x), self.micro_batch):
            stop = start + self.micro_batch
            graph.run(x[start:stop], y[start:stop], None)
            total += float(graph.output)
        self.sample_passes += len(x)
        mean = total / len(x)
        if not math.isfinite(mean):
            raise NonFiniteLossError(
                f"the loss of a batch of {len(x)} samples is {mean}: the weights have diverged",
                hint="use a smaller learning_rate or sigma",
            )
        return mean

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
        x, _ = self._checked(x, None)
        graph = self._open("moments.onnx")
        self._set_weights(weights)
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
            Sum of the cross-entropies, number of samples whose largest logit is the label's, and ``n``. The sum is
            infinite or NaN when the weights have diverged.
        """
        x, y = self._checked(x, y)
        step = min(micro_batch or self.micro_batch, self.micro_batch)
        loss_sum, correct = 0.0, 0
        out = np.empty((step, self.artifact.manifest.n_classes), dtype=np.float32)
        for start in range(0, len(x), step):
            labels = y[start : start + step]
            logits = self.logits(weights, x[start : start + step], out=out[: len(labels)]).astype(np.float64)
            correct += int(np.count_nonzero(logits.argmax(axis=1) == labels))
            with np.errstate(invalid="ignore", over="ignore"):
                logits -= logits.max(axis=1, keepdims=True)
                losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
            loss_sum += float(losses.sum())
        return loss_sum, correct, len(x)

    def check_golden(self) -> float:
        """Compare the loss of the dense initial weights with the manifest's known answer.

        Returns:
            The absolute difference.

        Raises:
            SelfTestError: It is larger than the manifest's tolerance: this machine computes something else.
        """
        manifest = self.artifact.manifest
        golden = manifest.golden
        x, y = golden_batch(manifest.input_shape, manifest.n_classes, golden.seed, golden.batch)
        self.close()
        extra = 8 * (manifest.layout.size - self.n_survivors)
        with Engine(
            self.artifact,
            Mask.dense(manifest.layout),
            threads=self._threads,
            micro_batch=self.micro_batch,
            arena_bytes=None if self._arena_bytes is None else self._arena_bytes + extra,
            providers=self._providers,
            strict_providers=self._strict,
        ) as dense:
            loss = dense.loss(initial_weights(manifest.layout, manifest.seed), x, y)
        difference = abs(loss - golden.mean_loss)
        if not difference <= golden.tolerance:
            raise SelfTestError(
                f"the known answer of {self.artifact.source} is {golden.mean_loss:.9f}, this machine computes"
                f" {loss:.9f}; the difference {difference:.2e} is over the tolerance {golden.tolerance:.2e}",
                hint="try another onnxruntime version: some releases compute wrong results on some processors",
            )
        return difference

    def close(self) -> None:
        """Unload the graph and give its memory back; the engine stays usable and loads it again when needed."""
        if self._graph is not None:
            self._graph = None
            release_arena()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str) -> _Graph:
        if self._graph is None or self._graph.name != name:
            self.close()
            session = open_session(
                self.artifact,
                name,
                threads=self._threads,
                arena_bytes=self._arena_bytes,
                providers=self._providers,
                strict_providers=self._strict,
            )
            self._graph = _Graph(name, session, self._feeds, self.artifact.manifest.n_moments)
        return self._graph

    def _rows(
        self, name: str, weights: NDArray[np.float32], x: NDArray[np.float32], out: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        x, _ = self._checked(x, None)
        shape = (len(x), self.artifact.manifest.n_classes)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise DataError(f"out is {out.dtype}{list(out.shape)}, expected a contiguous float32{list(shape)}")
        graph = self._open(name)
        self._set_weights(weights)
        for start in range(0, len(x), self.micro_batch):
            stop = start + self.micro_batch
            graph.run(x[start:stop], None, out[start:stop])
        self.sample_passes += len(x)
        return out

    def _set_weights(self, weights: NDArray[np.float32]) -> None:
        if weights is not self.weights_feed:
            if weights.shape != self.weights_feed.shape or weights.dtype != np.float32:
                raise ArtifactError(
                    f"weights are {weights.dtype}{list(weights.shape)}, this mask needs float32[{self.n_survivors}]"
                )
            np.copyto(self.weights_feed, weights)

    def _checked(self, x: NDArray[Any], y: NDArray[Any] | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
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
