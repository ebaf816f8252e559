"""Whether ONNX Runtime computes what it should here: ``python -m fedzo.edge_runtime.inference.forward_check``.

Run as a process of its own, since a broken wheel kills the process that imports it. Each line on stdout begins with
the stage that is about to begin; the last one is ``done`` with one JSON object, or ``failed`` with one.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError, FedzoError, SelfTestError
from ...protocol.perturbation.quantiles import gaussian_table
from ...protocol.perturbation.streams import Purpose, uint16s
from ...protocol.pruning.mask import Mask
from ..installation.selftest import keeps_denormals
from ..planning.memory import peak_rss_mib
from ..storage.artifact import load_artifact
from .engine import Engine
from .golden_check import check_predictions
from .ort import available_providers, chosen_providers, runtime
from .providers import CPU, PROVIDER_OPTIONS, provider_names

__all__ = ["GRAPH", "WEIGHTS", "expected", "main", "seeded"]

GRAPH: Final = zlib.decompress(
    base64.b85decode(
        "c-nQ4F>k^!5QRA>5OaVU+)||~Qmd#_HlPzzM5VHHYB!e3Ar7F11jVMn*0Dc>pIRFbDoDtB%YAq6osZJ~uZ?|#HIh|_0r%~fJo^q>"
        "SpO15Celwi<qHv7p|u4kXrjH~u?%7VbP4MSoI&K<?;>3qr${?>8H_JD!KqV87fO4lA;MVC_87#6**cadMZR2k?iR?Uom_OJDrT{e"
        "Aqj~wY9qu9gzvnjTq%(SHMIG9COsWP@Bu;Sm}drwZx6+M9yG9`3ZBWqzCn*Ctdi!FnUZ=DE>%!PqH?ch=o20ggN=`G`Q#%{)SRzR"
        "LYR}}#flg4=uw}R-Qyhv)<TDsBd*3%B$R4ZjYjR=<!|vux463E9;jusqun!V1V`FCqi~#U?Y?=14NXlJqD6m5<RNU>H8yFDHU6)J"
        "0~<?j^ABRNV)p"
    )
)
"""An ONNX graph: a convolution, a Relu, one whose padding differs between the axes (wrong in 1.27.0 on processors with
SME), one by channels with strides, a linear layer and a float64 log-softmax. Its test builds it with onnx."""

WEIGHTS: Final = {"w1": (16, 8, 3, 3), "w2": (16, 16, 1, 3), "w3": (16, 1, 3, 3), "w4": (10, 256)}
_INPUT: Final = (4, 8, 9, 9)
_TOLERANCE: Final = 1e-5  # 6.8e-7 with onnxruntime 1.32.0 on x86-64


def seeded() -> dict[str, NDArray[np.float32]]:
    """The feeds: ``x`` and the weights, scaled by their fan-in."""
    feeds = {}
    for index, (name, shape) in enumerate({"x": _INPUT, **WEIGHTS}.items()):
        count, fan_in = int(np.prod(shape)), int(np.prod(shape[1:]))
        values = np.take(gaussian_table(), uint16s(1, Purpose.GOLDEN, 0, index, count), mode="clip").reshape(shape)
        scale = 1.0 if name == "x" else fan_in**-0.5
        feeds[name] = np.multiply(values, np.float32(scale))
    return feeds


def expected(feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """What the graph must give: ``float64[4, 10]``, computed by numpy."""
    x, w1, w2, w3, w4 = (feeds[name].astype(np.float64) for name in ("x", *WEIGHTS))
    x = np.maximum(_convolution(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), w1), 0.0)
    x = _convolution(np.pad(x, ((0, 0), (0, 0), (0, 0), (1, 1))), w2)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2]
    x = np.einsum("nchwij,cij->nchw", windows, w3[:, 0])
    logits = x.reshape(len(x), -1) @ w4.T
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _convolution(x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, w))


def _forward(providers: list[str]) -> tuple[float, str]:
    """Run the graph.

    Returns:
        The largest difference to :func:`expected`, and the provider that the session prefers.

    Raises:
        SelfTestError: The difference is too large.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    feeds = seeded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a provider that does not start: the answer says it
        session = ort.InferenceSession(
            GRAPH, options, providers=[(name, PROVIDER_OPTIONS.get(name, {})) for name in providers]
        )
    difference = float(np.abs(session.run(None, feeds)[0] - expected(feeds)).max())
    provider = str(session.get_providers()[0])
    if not difference <= _TOLERANCE:
        raise SelfTestError(
            f"a small network gives results that are wrong by {difference:.2e} on {provider},"
            f" {_TOLERANCE:.0e} is allowed",
            hint="install another release of onnxruntime: this one computes something else on this processor",
        )
    return difference, provider


def _golden(folder: Path, providers: tuple[str, ...], strict: bool) -> dict[str, Any]:
    """Both known answers of an artifact, whatever becomes of the other one."""
    artifact = load_artifact(folder)
    golden, dense = artifact.manifest.golden, Mask.dense(artifact.manifest.layout)
    answer: dict[str, Any] = {}
    with Engine(artifact, dense, micro_batch=8, providers=providers, strict_providers=strict) as engine:
        _stage("golden loss")
        answer["loss"] = _compared(engine.check_golden, golden.tolerance)
        if golden.predictions is not None:
            _stage("golden predictions")
            answer["predictions"] = _compared(lambda: check_predictions(engine), golden.predictions.tolerance)
    return answer


def _compared(difference: Callable[[], float | None], tolerance: float) -> dict[str, Any]:
    try:
        return {"difference": difference(), "tolerance": tolerance}
    except FedzoError as error:
        return {"message": error.message, "hint": error.hint}


def _stage(name: str, answer: dict[str, Any] | None = None) -> None:
    sys.stdout.write(name + ("" if answer is None else " " + json.dumps(answer)) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run every stage; 7 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="check its known answer as well")
    parser.add_argument("--provider", action="append", metavar="NAME", help="in order of preference [default: cpu]")
    parser.add_argument("--strict-providers", action="store_true", help="fail when the first one does not start")
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        wanted = provider_names(options.provider or (CPU,))
        _stage("import")
        answer: dict[str, Any] = {"onnxruntime": str(runtime().__version__), "available": available_providers()}
        _stage("forward")
        kept = keeps_denormals()
        answer["difference"], _ = _forward([CPU])
        _stage("providers")
        chosen = chosen_providers(wanted, options.strict_providers)
        _, taken = _forward(chosen)
        if options.strict_providers and taken != wanted[0]:
            raise ConfigError(f"{wanted[0]} did not start, a session runs on {taken}")
        answer["provider"], answer["wanted"] = taken, wanted[0]
        if options.artifact is not None:
            answer["golden"] = _golden(options.artifact, wanted, options.strict_providers)
        # After all sessions, in the same thread: ONNX Runtime must not have changed its floating-point mode.
        answer["denormals"] = keeps_denormals() or not kept
        answer["peak_mib"] = peak_rss_mib()
    except FedzoError as error:
        _stage("failed", {"message": error.message, "hint": error.hint})
        return SelfTestError.exit_code
    except Exception as error:  # noqa: BLE001 (whatever a broken wheel raises is what there is to report)
        _stage("failed", {"message": f"{type(error).__name__}: {error}"[:400], "hint": ""})
        return SelfTestError.exit_code
    _stage("done", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
