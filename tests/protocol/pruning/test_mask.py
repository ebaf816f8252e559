"""Masks: feeds, codec, and thresholds over scores."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.errors import ArtifactError, ConfigError, ProtocolError
from fedzo.protocol.pruning.mask import Mask, threshold
from tests.protocol.builders import one_parameter, seeded_normals, small_layout
from tests.protocol.golden.make import VECTORS

# A mask of small_layout() as fedzo 0.1 wrote it.
ENCODED = "465a4d318600000051d4bb7d3480c93e104eefecb37003c178dad310caeabd201dd8cdfa9fad4181a5c5801100346e055c"
INIT = Initialiser("constant", 0.0)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    return Layout(tuple(Parameter(f"p{k}", (n,), draw(st.booleans()), INIT) for k, n in enumerate(sizes)))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    layout = draw(layouts())
    kept = np.array(draw(st.lists(st.booleans(), min_size=layout.size, max_size=layout.size)))
    kept |= ~layout.maskable()
    for position in range(len(layout.parameters)):
        kept[layout.slice_of(position).start] = True
    return Mask(layout, kept)


@given(mask=masks())
def test_codec_round_trip(mask: Mask) -> None:
    copy = Mask.decode(mask.encode(), mask.layout)
    assert copy == mask
    assert hash(copy) == hash(mask)
    assert np.array_equal(copy.kept, mask.kept)


@given(mask=masks())
def test_feeds_describe_the_survivors(mask: Mask) -> None:
    layout = mask.layout
    survivors, index, counts = mask.survivors(), mask.index(), mask.counts()
    assert [survivors.dtype, index.dtype, counts.dtype] == [np.int64, np.int32, np.int64]
    assert survivors.tolist() == [i for i in range(layout.size) if mask.kept[i]]
    assert counts.sum() == mask.n_survivors == survivors.size
    offsets = np.repeat(np.array(layout.offsets), counts)
    assert np.array_equal(offsets + index, survivors)
    maskable = layout.maskable_size
    assert mask.sparsity == ((layout.size - mask.n_survivors) / maskable if maskable else 0.0)


@given(data=st.binary(max_size=120))
def test_foreign_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    layout = small_layout()
    header = Mask.dense(layout).encode()[:24]
    for attempt in (data, header + data, header + zlib.compress(data)):
        with pytest.raises(ProtocolError):
            Mask.decode(attempt, layout)


def test_bytes_of_an_older_release_still_decode() -> None:
    mask = Mask.decode(bytes.fromhex(ENCODED), small_layout())
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["masks"]
    assert mask.digest.hex() == vectors["digest"]
    assert mask.encode()[:24] == bytes.fromhex(ENCODED)[:24]


def body(layout: Layout, bits: NDArray[np.uint8]) -> bytes:
    return Mask.dense(layout).encode()[:24] + zlib.compress(np.packbits(bits, bitorder="little").tobytes())


def test_malformed_masks_are_refused() -> None:
    layout = small_layout()
    good = Mask.dense(layout).encode()
    ones = np.ones(136, dtype=np.uint8)
    ones[134:] = 0
    assert Mask.decode(body(layout, ones), layout) == Mask.dense(layout)
    not_maskable, collapsed, padding = ones.copy(), ones.copy(), ones.copy()
    not_maskable[73] = 0
    collapsed[80:134] = 0
    padding[135] = 1
    bad = {
        "header": good[:10],
        "starts with": b"FZM2" + good[4:],
        "another layout": good[:4] + struct.pack("<I", 135) + good[8:],
        "134 entries": good[:8] + bytes(16) + good[24:],
        "does not inflate": good[:24] + b"no zlib",
        "exactly 17 bytes": good[:-1],
        "17 bytes": good + b"x",
        "bytes of bits": body(layout, ones[:128]),
        "not exactly": body(layout, np.ones(144, dtype=np.uint8)),
        "norm.weight": body(layout, not_maskable),
        "fc.weight": body(layout, collapsed),
        "padding": body(layout, padding),
    }
    for message, data in bad.items():
        with pytest.raises(ProtocolError, match=message.replace(".", r"\.")):
            Mask.decode(data, layout)


def test_a_bomb_inflates_no_further_than_the_layout() -> None:
    layout = small_layout()
    bomb = Mask.dense(layout).encode()[:24] + zlib.compress(bytes(256 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="exactly"):
            Mask.decode(bomb, layout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize(
    "kept",
    [np.ones(133, dtype=np.bool_), np.ones(134, dtype=np.uint8), np.zeros(134, dtype=np.bool_)],
    ids=["short", "not bool", "empty"],
)
def test_impossible_masks_cannot_be_made(kept: NDArray[np.bool_]) -> None:
    with pytest.raises(ArtifactError):
        Mask(small_layout(), kept)


def test_a_mask_owns_its_bits() -> None:
    kept = np.ones(134, dtype=np.bool_)
    mask = Mask(small_layout(), kept)
    kept[0] = False
    assert mask.kept[0]
    with pytest.raises(ValueError, match="read-only"):
        mask.kept[0] = False


def test_a_mask_is_small_on_the_wire() -> None:
    layout = one_parameter(62_006)
    mask = threshold(layout, np.abs(seeded_normals(1, 0, 62_006)), 0.8)
    assert len(mask.encode()) < 62_006 / 8


score_lists = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45])
)


@given(layout=layouts(), data=st.data(), sparsity=st.floats(0, 0.999), floor=st.integers(1, 4))
def test_threshold_keeps_the_best(layout: Layout, data: st.DataObject, sparsity: float, floor: int) -> None:
    scores = np.array(data.draw(st.lists(score_lists, min_size=layout.size, max_size=layout.size)), dtype=np.float32)
    mask = threshold(layout, scores, sparsity, floor=floor)
    # The definition in plain Python: floors first, then the best of the rest; ties to the lower index.
    maskable = layout.maskable()

    def ranked(indices: range) -> list[int]:
        return sorted((i for i in indices if maskable[i]), key=lambda i: (-float(scores[i]), i))

    kept: set[int] = set()
    for position in range(len(layout.parameters)):
        part = layout.slice_of(position)
        kept.update(ranked(range(part.start, part.stop))[:floor])
    wanted = layout.maskable_size - round(sparsity * layout.maskable_size)
    for i in ranked(range(layout.size)):
        if len(kept) < wanted:
            kept.add(i)
    assert {int(i) for i in mask.survivors() if maskable[i]} == kept
    assert len(kept) >= wanted


@given(seed=st.integers(0, 1000))
def test_a_schedule_only_removes(seed: int) -> None:
    layout = small_layout()
    mask = Mask.dense(layout)
    for step, sparsity in enumerate((0.3, 0.6, 0.9)):
        pruned = threshold(layout, seeded_normals(seed, step, layout.size), sparsity, within=mask, floor=2)
        assert not (pruned.kept & ~mask.kept).any()
        assert layout.maskable_size - round(sparsity * layout.maskable_size) == pruned.n_survivors - 8
        assert pruned.counts().min() >= 2
        mask = pruned


def test_sparsity_is_exact_where_floors_allow() -> None:
    layout = one_parameter(1000)
    for sparsity in (0.0, 0.1, 0.8, 0.95, 0.999):
        mask = threshold(layout, seeded_normals(1, 0, 1000), sparsity)
        assert mask.n_survivors == 1000 - round(1000 * sparsity)
        assert mask.sparsity == pytest.approx(sparsity)


def test_equal_scores_keep_the_first_entries() -> None:
    mask = threshold(one_parameter(10), np.zeros(10, dtype=np.float32), 0.6)
    assert mask.survivors().tolist() == [0, 1, 2, 3]


def test_denormal_scores_are_ordered() -> None:
    scores = np.array([1e-45, 3e-45, 0.0, -0.0, -1e-45], dtype=np.float32)
    assert threshold(one_parameter(5), scores, 0.4).survivors().tolist() == [0, 1, 2]


def test_floors_beat_the_sparsity() -> None:
    layout = Layout((Parameter("a", (50,), True, INIT), Parameter("b", (50,), True, INIT)))
    scores = np.concatenate([np.ones(50), np.zeros(50)]).astype(np.float32)
    assert threshold(layout, scores, 0.9).counts().tolist() == [9, 1]
    assert threshold(layout, scores, 0.9, floor=8).counts().tolist() == [8, 8]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        threshold(one_parameter(5), np.zeros(5, dtype=np.float32), sparsity)


def test_bad_scores_floor_and_schedule() -> None:
    layout = one_parameter(5)
    scores = np.zeros(5, dtype=np.float32)
    with pytest.raises(ConfigError, match="scores were expected"):
        threshold(layout, scores[:4], 0.5)
    with pytest.raises(ConfigError, match="2 of 5 scores are not finite"):
        threshold(layout, np.array([1, np.nan, 2, np.inf, 3], dtype=np.float32), 0.5)
    with pytest.raises(ConfigError, match="floor"):
        threshold(layout, scores, 0.5, floor=0)
    with pytest.raises(ConfigError, match="kept only 2"):
        threshold(layout, scores, 0.2, within=threshold(layout, scores, 0.6))


def test_scores_of_other_parameters_may_be_anything() -> None:
    layout = small_layout()
    scores = np.ones(layout.size, dtype=np.float32)
    scores[~layout.maskable()] = np.nan
    assert threshold(layout, scores, 0.5).sparsity == 0.5
