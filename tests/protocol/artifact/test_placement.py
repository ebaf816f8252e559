"""Placements: what they compute, and what a foreign text may not do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.artifact.placement import BlockedAxis, Placement, decode_placements, encode_placements
from fedzo.protocol.errors import ArtifactError

LAYOUT = Layout(
    (
        Parameter("a", (6, 3), True, Initialiser("constant", 0.0)),
        Parameter("b", (), False, Initialiser("constant", 0.0)),
    )
)
# Rows in blocks of 4, the last one half empty, the entries of a block next to each other: (2, 3, 4).
BLOCKED = Placement(24, (BlockedAxis(4, 12, 1), BlockedAxis(3, 0, 4)))


def test_positions() -> None:
    expected = np.pad(np.arange(18).reshape(6, 3), [(0, 2), (0, 0)], constant_values=-1).reshape(2, 4, 3)
    tensor = expected.transpose(0, 2, 1).ravel()
    positions = BLOCKED.positions((6, 3), np.arange(18, dtype=np.int32))
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(tensor[positions], np.arange(18))
    np.testing.assert_array_equal(Placement(5, ()).positions((), np.zeros(1, np.int32)), [0])


def test_round_trip() -> None:
    text = encode_placements({"b": Placement(16, ()), "a": BLOCKED})
    assert text == '{"a":[24,[4,12,1],[3,0,4]],"b":[16]}'
    assert decode_placements(text, LAYOUT) == {"a": BLOCKED, "b": Placement(16, ())}
    assert decode_placements("{}", LAYOUT) == {}


@pytest.mark.parametrize(
    "row",
    [
        {"c": [1]},
        {"a": []},
        {"a": 5},
        {"a": [24, [4, 12, 1]]},
        {"a": [24, [4, 12, 1], [3, 0, 4], [1, 0, 0]]},
        {"a": [24, [4, 12], [3, 0, 4]]},
        {"a": [24, [0, 12, 1], [3, 0, 4]]},
        {"a": [24, [4, 13, 1], [3, 0, 4]]},  # the last entry would lie at 24
        {"a": [23, [4, 12, 1], [3, 0, 4]]},
        {"a": [17, [6, 0, 1], [3, 0, 1]]},
        {"a": [24, [4, -12, 1], [3, 0, 4]]},
        {"a": [24, [4, 12.0, 1], [3, 0, 4]]},
        {"a": [True, [4, 12, 1], [3, 0, 4]]},
        {"a": [1 << 40, [4, 12, 1], [3, 0, 4]]},
        {"a": ["24", [4, 12, 1], [3, 0, 4]]},
        [],
        None,
    ],
)
def test_malformed_texts(row: object) -> None:
    with pytest.raises(ArtifactError, match=r"placements|no parameter 'c'"):
        decode_placements(json.dumps(row), LAYOUT)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": NaN}'])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ArtifactError, match="placements"):
        decode_placements(text, LAYOUT)
