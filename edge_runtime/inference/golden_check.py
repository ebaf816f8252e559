"""Whether the predictions of this machine are those that the artifact was exported with."""

from __future__ import annotations

from ...protocol.artifact.layout import initial_weights
from ...protocol.artifact.manifest import golden_batch
from ...protocol.errors import ArtifactError, SelfTestError
from .engine import Engine

__all__ = ["check_predictions"]


def check_predictions(engine: Engine) -> float | None:
    """Run ``predict.onnx`` on the golden batch; :meth:`Engine.check_golden` does the same for the loss.

    Args:
        engine: One without a mask: the known answer is that of the dense initial weights.

    Returns:
        The largest difference of a logit; None when the artifact is of a release that stored no predictions.

    Raises:
        ArtifactError: The engine has a mask.
        SelfTestError: The difference is larger than the manifest's tolerance: this machine computes something else.
    """
    manifest = engine.artifact.manifest
    wanted = manifest.golden.predictions
    if wanted is None:
        return None
    if engine.n_survivors != manifest.layout.size:
        raise ArtifactError("golden predictions are those of all weights, this engine has a mask")
    x, _ = golden_batch(manifest.input_shape, manifest.n_classes, manifest.golden.seed, manifest.golden.batch)
    difference = wanted.difference(engine.logits(initial_weights(manifest.layout, manifest.seed), x))
    if not difference <= wanted.tolerance:
        raise SelfTestError(
            f"the predictions of {engine.artifact.source} on its golden batch are wrong by {difference:.2e},"
            f" {wanted.tolerance:.2e} is allowed",
            hint="try another onnxruntime version: some releases compute wrong results on some processors",
        )
    return difference
