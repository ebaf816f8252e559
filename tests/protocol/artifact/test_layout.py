"""The flat vector: offsets, JSON, initial weights."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.artifact.layout import MAX_PARAMETERS, Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, uint16s
from tests.protocol.builders import small_layout

initialisers = st.builds(
    Initialiser,
    st.sampled_from(["normal", "uniform", "constant"]),
    st.floats(-100, 100, width=32, allow_nan=False),
)
parameters = st.builds(
    Parameter,
    st.text(min_size=1, max_size=20),
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.booleans(),
    initialisers,
)
layouts = st.lists(parameters, min_size=1, max_size=6, unique_by=lambda p: p.name).map(lambda p: Layout(tuple(p)))


@given(layout=layouts)
def test_json_round_trip(layout: Layout) -> None:
    copy = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert copy == layout
    assert copy.digest == layout.digest
    assert copy.offsets == layout.offsets


@given(layout=layouts)
def test_slices_tile_the_vector(layout: Layout) -> None:
    end = 0
    for position, parameter in enumerate(layout.parameters):
        part = layout.slice_of(position)
        assert part.start == end
        end = part.stop
        assert part.stop - part.start == math.prod(parameter.shape)
        assert layout.position_of(parameter.name) == position
        assert (layout.maskable()[part] == parameter.maskable).all()
    assert end == layout.size == initial_weights(layout, 1).size
    assert layout.maskable_size == np.count_nonzero(layout.maskable())


GOOD: dict[str, Any] = {"name": "w", "shape": [2, 3], "maskable": True, "init": "normal", "scale": 0.5}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        [],
        [None],
        [[]],
        [GOOD, GOOD],
        [GOOD] * (MAX_PARAMETERS + 1),
        *[[{**GOOD, key: value}] for key, value in [
            ("name", ""), ("name", 3), ("name", "x" * 257), ("shape", "23"), ("shape", [0]), ("shape", [-1, 2]),
            ("shape", [True]), ("shape", [2.0]), ("shape", [1 << 29]), ("shape", [1] * 9), ("maskable", 1),
            ("maskable", None), ("init", "zeros"), ("init", []), ("scale", math.nan), ("scale", math.inf),
            ("scale", "1"), ("scale", True), ("scale", 0.1), ("scale", 1e300), ("scale", 10**400),
        ]],
        *[[{k: v for k, v in GOOD.items() if k != key}] for key in GOOD],
    ],
)  # fmt: skip
def test_malformed_json_is_refused(data: object) -> None:
    with pytest.raises(ArtifactError):
        Layout.from_json(data)


def test_unknown_parameter() -> None:
    with pytest.raises(ArtifactError, match=r"fc\.bias"):
        small_layout().position_of("fc.bias")


@pytest.mark.parametrize("change", [{"name": "v"}, {"shape": [3, 2]}, {"maskable": False}, {"scale": 0.25}])
def test_digest_covers_every_field(change: dict[str, Any]) -> None:
    assert Layout.from_json([{**GOOD, **change}]).digest != Layout.from_json([GOOD]).digest


def test_initial_weights_of_each_kind() -> None:
    layout = small_layout()
    weights = initial_weights(layout, 5)
    assert weights.dtype == np.float32
    bits = uint16s(5, Purpose.INIT, 0, 0, 72)
    normal = gaussian_table()[bits] * np.float32(layout.parameters[0].initialiser.scale)
    assert np.array_equal(weights[:72], normal)
    assert weights[72:76].tolist() == [1.0] * 4
    assert weights[76:80].tolist() == [0.0] * 4
    bits = uint16s(5, Purpose.INIT, 0, 3, 54)
    uniform = (2.0 * bits.astype(np.float64) - 65535.0) / 65536.0 * 0.25
    assert np.array_equal(weights[80:], uniform)


def test_uniform_initial_weights_are_uniform() -> None:
    layout = Layout((Parameter("w", (50_000,), True, Initialiser("uniform", 2.0)),))
    weights = initial_weights(layout, 3)
    assert np.abs(weights).max() < 2.0
    assert abs(float(weights.astype(np.float64).mean())) < 0.03
    assert abs(float(weights.astype(np.float64).var()) - 4.0 / 3.0) < 0.03


def test_other_seeds_give_other_weights_and_parameters_do_not_share_them() -> None:
    pair = Layout(tuple(Parameter(name, (40,), True, Initialiser("normal", 1.0)) for name in "ab"))
    weights = initial_weights(pair, 1)
    assert not np.array_equal(weights, initial_weights(pair, 2))
    assert not np.array_equal(weights[:40], weights[40:])
    assert np.array_equal(weights, initial_weights(pair, 1))
