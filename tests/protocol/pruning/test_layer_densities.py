"""Masks that are drawn from layer densities and a seed: the formula of ERK, the draw bit for bit, and the bytes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.errors import ArtifactError, ConfigError, ProtocolError
from fedzo.protocol.pruning.layer_densities import (
    LayerDensities,
    check_floor,
    erk_densities,
    read_mask,
    uniform_densities,
)
from fedzo.protocol.pruning.mask import Mask
from tests.protocol.builders import small_layout

INIT = Initialiser("constant", 0.0)


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    weights = [Parameter(f"w{k}", shape, True, INIT) for k, shape in enumerate(shapes)]
    return Layout((*weights, Parameter("bias", (3,), False, INIT)))


LENET = layout_of((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84))

shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


def reference(layout: Layout, sparsity: float) -> list[float]:
    """Exact survivors of each layer, as ERK's code finds them: cap the densest layer, start again."""
    sizes = [p.size for p in layout.parameters if p.maskable]
    raw = [sum(p.shape) / p.size for p in layout.parameters if p.maskable]
    dense: set[int] = set()
    while True:
        wanted = (1.0 - sparsity) * sum(sizes) - sum(sizes[k] for k in dense)
        open_ = [k for k in range(len(sizes)) if k not in dense]
        scale = wanted / sum(raw[k] * sizes[k] for k in open_)
        worst = max(open_, key=lambda k: raw[k])
        if scale * raw[worst] <= 1.0:
            return [float(n) if k in dense else scale * raw[k] * n for k, n in enumerate(sizes)]
        dense.add(worst)


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.9, 0.98])
def test_erk_keeps_what_the_formula_says(sparsity: float) -> None:
    counts = erk_densities(LENET, sparsity, 1).counts
    assert sum(counts) == LENET.maskable_size - round(sparsity * LENET.maskable_size)
    assert np.abs(np.array(counts) - reference(LENET, sparsity)).max() <= 1.0
    assert all(count <= p.size for count, p in zip(counts, LENET.parameters, strict=False))


def test_small_layers_stay_dense_and_the_others_share_the_rest() -> None:
    counts = erk_densities(LENET, 0.8, 1).counts
    assert counts[0] == 150
    assert counts[4] == 840
    assert counts[2] < 0.2 * 48_000 < 0.5 * 48_000
    assert counts[3] / counts[2] == pytest.approx((84 + 120) / (120 + 400), rel=1e-3)


@given(shapes=shapes, sparsity=st.floats(0.0, 0.99), floor=st.integers(1, 20), seed=st.integers(0, 2**64 - 1))
def test_no_layer_collapses_and_the_sum_is_exact(
    shapes: list[tuple[int, int]], sparsity: float, floor: int, seed: int
) -> None:
    layout = layout_of(*shapes)
    least = sum(min(floor, math.prod(shape)) for shape in shapes)
    wanted = layout.maskable_size - round(sparsity * layout.maskable_size)
    for share in (erk_densities, uniform_densities):
        if least > wanted:
            with pytest.raises(ConfigError, match="a floor of"):
                share(layout, sparsity, seed, floor)
            continue
        found = share(layout, sparsity, seed, floor)
        assert sum(found.counts) == wanted
        assert all(min(floor, math.prod(shape)) <= count for count, shape in zip(found.counts, shapes, strict=True))
        mask = found.draw()
        assert mask.counts().tolist() == [*found.counts, 3]
        assert read_mask(found.encode(), layout) == mask
        assert LayerDensities.decode(found.encode(), layout) == found


def test_random_keeps_the_same_part_of_every_layer() -> None:
    counts = uniform_densities(LENET, 0.8, 1).counts
    assert [count / p.size for count, p in zip(counts, LENET.parameters, strict=False)] == pytest.approx(
        [0.2] * 5, abs=1e-2
    )


def test_the_drawn_mask_is_the_same_everywhere() -> None:
    mask = erk_densities(LENET, 0.9, 7).draw()
    assert mask.digest.hex() == "27392f87eb792ce66796b97539ddb7b22eb9dd829747eda838c6069fa4dfaa1b"
    assert mask.digest != erk_densities(LENET, 0.9, 8).draw().digest
    assert len(erk_densities(LENET, 0.9, 7).encode()) == 68
    filled = read_mask(erk_densities(LENET, 0.9, 7).encode(), LENET, "init")
    assert (filled.fill, filled.digest) == ("init", mask.digest)


def test_a_bitmap_is_read_as_before() -> None:
    mask = Mask.dense(small_layout())
    assert read_mask(mask.encode(), small_layout()) == mask


def test_malformed_densities_are_refused() -> None:
    good = erk_densities(LENET, 0.9, 7).encode()
    bad = {
        "68 bytes": good[:-1],
        "start with": b"FZD2" + good[4:],
        "another layout": good[:4] + struct.pack("<I", 5) + good[8:],
        "draws the mask": good[:24] + struct.pack("<Q", 8) + good[32:],
        "cannot keep": good[:-4] + struct.pack("<I", 841),
        "layers of": good[:-4] + bytes(4),
    }
    for message, data in bad.items():
        with pytest.raises(ProtocolError, match=message):
            LayerDensities.decode(data, LENET)


@given(data=st.binary(max_size=120))
def test_foreign_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    for attempt in (data, b"FZD1" + data, erk_densities(LENET, 0.9, 7).encode()[:48] + data[:20]):
        try:
            read_mask(attempt, LENET)
        except ProtocolError:
            continue
        assert attempt == erk_densities(LENET, 0.9, 7).encode()


def test_impossible_floors_and_counts() -> None:
    check_floor(LENET, 0.9, 700)
    with pytest.raises(ConfigError, match="a floor of 3000 survivors in 5 layers keeps"):
        check_floor(LENET, 0.9, 3_000)
    with pytest.raises(ArtifactError, match="4 layer densities for 5"):
        LayerDensities(LENET, 1, (1, 1, 1, 1))
