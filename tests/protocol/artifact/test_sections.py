"""sections: how directions are dealt to them, and the record in the manifest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.artifact.cut import Cut
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.artifact.sections import Sections, is_section_graph, section_graphs
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.perturbation.blocks import blocks_of
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.settings import RunSettings, TrainingSettings
from tests.protocol.builders import small_manifest

SECTIONS = Sections((Cut(1, (8, 4), 100, 300), Cut(2, (6,), 300, 100)), (1.0, 4.0, 9.0))


def test_directions_go_to_sections_of_much_gradient_many_weights_and_cheap_probes() -> None:
    # Roots of gain times weights over cost: (4 * 75 / 0.75)^0.5 = 20 and (9 * 400 / 0.25)^0.5 = 120.
    assert SECTIONS.dealt(140, (10, 75, 400)) == (20, 120)
    assert SECTIONS.dealt(140, (10, 75, 400), multiple=8) == (16, 120)
    assert SECTIONS.dealt(1, (10, 1, 1)) == (1, 1)


@given(st.integers(1, 10_000), st.tuples(*[st.integers(1, 10**6)] * 3), st.integers(1, 16))
def test_every_section_gets_directions(total: int, sizes: tuple[int, int, int], multiple: int) -> None:
    dealt = SECTIONS.dealt(total, sizes, multiple)
    assert all(k >= multiple and k % multiple == 0 for k in dealt)
    assert abs(sum(dealt) - total) <= len(dealt) * multiple


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, True) for name in section_graphs(8)),
        ("section7.onnx", False),
        ("suffix0.onnx", False),
        ("suffix.onnx", False),
    ],
)
def test_names_of_graphs(name: str, known: bool) -> None:
    assert is_section_graph(name) is known


def with_sections(**changes: Any) -> Manifest:
    """The small manifest, with sections and their graphs."""
    raw = small_manifest().to_json()
    raw["sections"] = {**json.loads(json.dumps(SECTIONS.to_json())), **changes}
    for name in section_graphs(3):
        raw["graphs"][name] = raw["graphs"]["probe.onnx"]
    return Manifest.decode(json.dumps(raw).encode())


def test_round_trip_and_blocks() -> None:
    manifest = with_sections()
    assert manifest.sections == SECTIONS
    assert Manifest.decode(manifest.encode()) == manifest
    training = TrainingSettings(estimator="split", k=3, tail_k=20, local_steps=1)
    mask = Mask.dense(manifest.layout)
    blocks = blocks_of(training, manifest, mask)
    sizes = SECTIONS.sizes(mask.counts().tolist())
    assert [block.size for block in blocks] == list(sizes)
    assert [block.first for block in blocks] == [0, sizes[0], sizes[0] + sizes[1]]
    assert [block.k for block in blocks] == [3, *SECTIONS.dealt(20, sizes)]
    names = {graph.name for graph in needed_graphs(manifest, RunSettings(training=training))}
    assert names.issuperset(section_graphs(3))


@pytest.mark.parametrize(
    "changes",
    [
        {"cuts": []},
        {"cuts": [SECTIONS.cuts[0].to_json()]},
        {"cuts": [cut.to_json() for cut in reversed(SECTIONS.cuts)]},
        {"cuts": [SECTIONS.cuts[0].to_json()] * 9},
        {"cuts": [{**cut.to_json(), "first_parameter": k + 1000} for k, cut in enumerate(SECTIONS.cuts)]},
        {"cuts": [SECTIONS.cuts[0].to_json(), {**SECTIONS.cuts[1].to_json(), "suffix_multiply_accumulates": 1}]},
        {"cuts": 5},
        {"gains": [1.0, 2.0]},
        {"gains": [1.0, 2.0, -1.0]},
        {"gains": [1.0, 2.0, float("nan")]},
        {"gains": [0.0, 0.0, 0.0]},
        {"gains": ["a", 1.0, 1.0]},
        {"gains": [True, 1.0, 1.0]},
    ],
    ids=str,
)
def test_impossible_records_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        with_sections(**changes)


def test_missing_graphs_are_noticed() -> None:
    raw = with_sections().to_json()
    del raw["graphs"]["suffix2.onnx"]
    with pytest.raises(ArtifactError, match=r"sections without suffix2\.onnx"):
        Manifest.decode(json.dumps(raw).encode())
