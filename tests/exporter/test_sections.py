"""sections: where a network is cut in several places, and that the pieces compute what the whole does."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.exporter.artifact import export_artifact, verify_artifact
from fedzo.exporter.channel_scores import SCORING_SAMPLES
from fedzo.exporter.reference import exact_scores
from fedzo.exporter.sections import choose_sections
from fedzo.exporter.sessions import dense_feeds, open_graph
from fedzo.protocol.artifact.cut import Cut
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.artifact.sections import section_graph, section_graphs, suffix_graph
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.saliency import gaussian_inputs


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Cut], list[int], list[float]]:
    """A network of one parameter between any two cuts."""
    works = draw(st.lists(st.integers(1, 50), min_size=3, max_size=7))
    total, passed, cuts = sum(works), 0, []
    for position, work in enumerate(works[:-1], 1):
        passed += work
        cuts.append(Cut(position, (4,), passed, total - passed))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=len(works), max_size=len(works)))
    gains = draw(st.lists(st.floats(0.0, 100.0), min_size=len(works), max_size=len(works)))
    return cuts, sizes, gains


def error(cuts: list[Cut], sizes: list[int], gains: list[float], chosen: tuple[int, ...]) -> float:
    edges = [0, *(cuts[k].first_parameter for k in chosen), len(sizes)]
    costs = [1.0, *(cuts[k].suffix_share for k in chosen)]
    parts = zip(itertools.pairwise(edges), costs, strict=True)
    return sum(math.sqrt(sum(sizes[a:b]) * sum(gains[a:b]) * cost) for (a, b), cost in parts)


@given(chains(), st.integers(3, 8))
def test_the_best_of_all_choices_is_taken(chain: tuple[list[Cut], list[int], list[float]], most: int) -> None:
    cuts, sizes, gains = chain
    chosen = choose_sections(cuts, sizes, gains, most)
    n = min(most - 1, len(cuts))
    assert len(chosen) == n
    assert list(chosen) == sorted(set(chosen))
    best = min(error(cuts, sizes, gains, tried) for tried in itertools.combinations(range(len(cuts)), n))
    assert error(cuts, sizes, gains, chosen) == pytest.approx(best)


@pytest.mark.parametrize(
    ("model", "shape", "most", "n"), [("lenet5", (1, 32, 32), 8, 5), ("resnet8", (3, 16, 16), 4, 4)]
)
def test_pieces_make_the_whole(model: str, shape: tuple[int, ...], most: int, n: int, tmp_path: Path) -> None:
    manifest = export_artifact(model, shape, 10, 0.5, 3, tmp_path / "artifact", sections=most)
    assert verify_artifact(tmp_path / "artifact") == manifest
    sections = manifest.sections
    assert sections is not None
    assert len(sections) == n
    weights, layout = initial_weights(manifest.layout, 3), manifest.layout
    x, y = golden_batch(shape, 10, 5, 6)
    graphs = {name: open_graph((tmp_path / "artifact" / name).read_bytes()) for name in section_graphs(n)}
    whole = open_graph((tmp_path / "artifact" / "probe.onnx").read_bytes())
    loss = whole({**dense_feeds(layout, weights), "x": x, "y": y})["loss_sum"]
    features = x
    for number, cut in enumerate(sections.cuts):
        own = sections.stage(number, shape).layout(layout)
        begin = layout.offsets[sections.stage(number, shape).first_parameter]
        feeds = {**dense_feeds(own, weights[begin : begin + own.size]), "features": features}
        features = graphs[section_graph(number)](feeds)["next_features"]
        assert features.shape[1:] == cut.feature_shape
        behind = cut.split(layout)[1]
        feeds = {**dense_feeds(behind, weights[layout.size - behind.size :]), "features": features, "y": y}
        assert graphs[suffix_graph(number + 1)](feeds)["loss_sum"] == pytest.approx(loss, rel=1e-6)


def test_gains_are_the_squared_gradients(tmp_path: Path) -> None:
    """Against automatic differentiation, of the weights of layers; biases are left out.

    A shift moves a channel everywhere at once: exact behind a fully connected layer, an estimate for convolutions.
    """
    manifest = export_artifact("lenet5", (1, 32, 32), 10, 0.5, 3, tmp_path / "artifact", sections=5)
    sections, layout = manifest.sections, manifest.layout
    assert sections is not None
    weights = initial_weights(layout, 3)
    x = gaussian_inputs(manifest, 3, 0, 0, SCORING_SAMPLES)
    scores = exact_scores("lenet5", layout, weights, x)
    squares = np.divide(scores, weights.astype(np.float64) ** 2, out=np.zeros_like(scores), where=weights != 0)
    exact = [squares[layout.slice_of(k)].sum() for k, p in enumerate(layout.parameters) if p.name.endswith("weight")]
    assert sections.gains[1:] == pytest.approx(exact[1:], rel=0.35)
    assert exact[0] < sections.gains[0] < 5 * exact[0]


def test_artifacts_with_one_cut_have_no_sections(tmp_path: Path) -> None:
    assert export_artifact("lenet5", (1, 32, 32), 10, 0.0, 3, tmp_path / "artifact").sections is None


@pytest.mark.parametrize(
    ("model", "shape", "options", "message"),
    [
        ("lenet5", (1, 32, 32), {"sections": 9}, "the number of sections is 9, it must be 2 to 8"),
        ("lenet5", (1, 32, 32), {"sections": 1}, "the number of sections is 1"),
        (
            "lenet5",
            (1, 32, 32),
            {"sections": 3, "local_heads": True},
            "local heads are not made for networks in sections",
        ),
        ("tests.exporter.user_models:one_layer", (6,), {"sections": 3}, "the network can be cut in 0 places"),
    ],
)
def test_refused(model: str, shape: tuple[int, ...], options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_artifact(model, shape, 10 if len(shape) > 1 else 4, 0.5, 3, tmp_path / "artifact", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "artifact").exists()
