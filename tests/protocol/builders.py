"""Small layouts, manifests and coefficients that several test files share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.artifact.manifest import Golden, GraphFile, GraphMemory, Manifest, UnitLayer
from fedzo.protocol.perturbation.directions import round_coefficients
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, uint16s

FAN_IN_SCALE = float(np.float32(0.3))


def small_layout() -> Layout:
    """A grouped convolution, a normalisation and a linear layer: 4 parameters, 134 entries."""
    return Layout(
        (
            Parameter("conv.weight", (4, 2, 3, 3), True, Initialiser("normal", FAN_IN_SCALE)),
            Parameter("norm.weight", (4,), False, Initialiser("constant", 1.0)),
            Parameter("norm.bias", (4,), False, Initialiser("constant", 0.0)),
            Parameter("fc.weight", (3, 18), True, Initialiser("uniform", 0.25)),
        )
    )


def small_manifest() -> Manifest:
    """A manifest over :func:`small_layout`; its graphs do not exist."""
    return Manifest(
        model="small",
        input_shape=(4, 5, 5),
        n_classes=3,
        seed=11,
        sparsity=0.5,
        layout=small_layout(),
        units=(
            UnitLayer("conv.weight", 4, 2, 0, 0, 36, False),
            UnitLayer("fc.weight", 3, 1, 4, 36, 18, True),
        ),
        graphs=(GraphFile("probe.onnx", bytes(range(32)), 1234), GraphFile("predict.onnx", bytes(32), 99)),
        memory=(GraphMemory("probe.onnx", ((1000, 10), (500, 30))),),
        golden=Golden(7, 8, 1.0986, 1e-5),
        producer="tests",
    )


def one_parameter(size: int) -> Layout:
    """A layout of one maskable parameter with ``size`` normal entries of scale 1/8."""
    return Layout((Parameter("w", (size,), True, Initialiser("normal", 0.125)),))


def seeded_normals(seed: int, index: int, count: int) -> NDArray[np.float32]:
    """Reproducible normals that do not depend on numpy's generators."""
    return np.take(gaussian_table(), uint16s(seed, Purpose.BATCH, 0, index, count), mode="clip")


def seeded_coefficients(seed: int, index: int, count: int) -> NDArray[np.float32]:
    """Reproducible coefficients of an update."""
    return round_coefficients(seeded_normals(seed, index, count).astype(np.float64) * 3.0)
