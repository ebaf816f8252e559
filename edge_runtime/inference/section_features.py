"""What enters the sections of a network, one after another: each from what entered the one before it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.cut import Cut
from ...protocol.artifact.manifest import CUT_GRAPHS
from ...protocol.artifact.sections import section_graph, suffix_graph
from .cut_graphs import CutWeights
from .engine import Engine
from .stage_graphs import StageRun, StageWeights, rows_of

__all__ = ["section_features"]


def section_features(
    engine: Engine, weights: NDArray[np.float32], x: NDArray[np.float32]
) -> Iterator[tuple[Cut, str, NDArray[np.float32]]]:
    """Features for the probes of every section but the first, front to back.

    An artifact without sections has its one cut. The engine's weights may be overwritten between two steps.

    Args:
        engine: Gives artifact, mask and limits; a graph that it has loaded is closed.
        weights: ``float32[n_survivors]``, read only.
        x: ``float32[n, *input_shape]``, checked.

    Yields:
        The cut, the file name of the graph behind it and ``float32[n, *feature_shape]``, owned by the caller.

    Raises:
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """
    manifest = engine.artifact.manifest
    sections = manifest.sections
    if sections is None:
        assert manifest.cut is not None, "blocks_of() refuses other artifacts"
        yield manifest.cut, CUT_GRAPHS[1], CutWeights(engine, manifest.cut).features(CUT_GRAPHS[0], weights, x)
        return
    features = x
    for number, cut in enumerate(sections.cuts):
        stage = sections.stage(number, manifest.input_shape)
        entering, features = features, rows_of(len(x), cut.feature_shape)
        engine.feeds.write(weights)
        own = StageWeights(engine, stage).feeds()
        with StageRun(engine, section_graph(number), own, {"features": entering}, {"next_features": features}) as run:
            run.run()
        whole = cut.prefix_multiply_accumulates + cut.suffix_multiply_accumulates
        engine.sample_passes += len(x) * stage.multiply_accumulates / whole
        del entering, run
        yield cut, suffix_graph(number + 1), features
