"""The known answer of an artifact: what this machine computes for it, against what the exporter computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...protocol.artifact.layout import initial_weights
from ...protocol.artifact.manifest import golden_batch
from ...protocol.errors import FedzoError, MemoryBudgetError, SelfTestError

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["golden_difference", "wrong_answer"]


def golden_difference(dense: Engine) -> float:
    """Difference between the loss of the initial weights and the manifest's.

    Args:
        dense: An engine without a mask.

    Raises:
        SelfTestError: It is larger than the manifest's tolerance: this machine computes something else.
    """
    manifest = dense.artifact.manifest
    golden = manifest.golden
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, golden.seed, golden.batch)
    loss = dense.loss(initial_weights(manifest.layout, manifest.seed), x, y)
    difference = abs(loss - golden.mean_loss)
    if not difference <= golden.tolerance:
        raise SelfTestError(
            f"the known answer of {dense.artifact.source} is {golden.mean_loss:.9f}, this machine computes"
            f" {loss:.9f}; the difference {difference:.2e} is over the tolerance {golden.tolerance:.2e}",
            hint="try another onnxruntime version: some releases compute wrong results on some processors",
        )
    return difference


def wrong_answer(dense: Engine) -> FedzoError | None:
    """Why the graph of ``dense`` cannot be trusted; None if it gives the known answer.

    Raises:
        MemoryBudgetError: It does not fit.
    """
    try:
        golden_difference(dense)
    except MemoryBudgetError:
        raise
    except FedzoError as error:
        return error
    return None
