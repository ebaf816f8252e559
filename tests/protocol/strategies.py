"""Hypothesis strategies for every message and document, within the limits of the protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedzo.protocol.perturbation.directions import FAMILIES, MAX_BLOCKS, MAX_POSITION
from fedzo.protocol.replay.optimisers import OPTIMISERS, OptimiserConfig
from fedzo.protocol.replay.schedules import SCHEDULES
from fedzo.protocol.settings import (
    DEALING_ESTIMATORS,
    ESTIMATORS,
    RunSettings,
    SaliencySettings,
    TrainingSettings,
)
from fedzo.protocol.wire.codec import BinaryMessage
from fedzo.protocol.wire.documents import (
    Announcement,
    Document,
    Hello,
    Order,
    Presence,
    RunDocument,
    ServerPresence,
    pack_participants,
)
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest, LogSlice, SnapshotOffer

u32 = st.integers(0, 2**32 - 1)
tags = st.binary(min_size=4, max_size=4)
digests = st.binary(min_size=16, max_size=16)
hashes = st.binary(min_size=32, max_size=32)
names = st.from_regex(r"[a-z0-9-]{1,48}", fullmatch=True)
doubles = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def scalars(size: int | st.SearchStrategy[int]) -> st.SearchStrategy[NDArray[np.float32]]:
    """Finite ``float32[size]``."""
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
    return arrays(np.float32, size, elements=finite)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """Reports of any kind, with scalars or declined."""
    decline = draw(st.sampled_from(Decline))
    blocks = draw(st.lists(scalars(st.integers(0, 20)), min_size=1, max_size=16)) if decline is Decline.NONE else []
    return Report(
        draw(st.sampled_from(ReportKind)), draw(tags), draw(u32), draw(u32), draw(u32), draw(digests), draw(doubles),
        draw(u32), draw(u32), draw(u32), tuple(blocks), decline, draw(st.integers(0, 2**16 - 1)),
    )  # fmt: skip


@st.composite
def updates(draw: st.DrawFn, index: int | None = None) -> UpdateRecord:
    """Update records with a few segments in a few blocks."""
    segments = []
    for block in draw(st.lists(st.integers(0, MAX_BLOCKS - 1), unique=True, min_size=1, max_size=3).map(sorted)):
        end = block * MAX_POSITION
        for gap, count in draw(st.lists(st.tuples(st.integers(0, 2**58), st.integers(1, 8)), min_size=1, max_size=3)):
            segments.append((end + gap, count))
            end += gap + count
    total = sum(count for _, count in segments)
    rate = draw(st.floats(allow_nan=False, allow_infinity=False, width=32))
    return UpdateRecord(
        draw(u32) if index is None else index, draw(u32), rate, tuple(segments), draw(scalars(total)), draw(digests),
        draw(digests),
    )  # fmt: skip


@st.composite
def blob_requests(draw: st.DrawFn) -> BlobRequest:
    """Requests for blocks."""
    return BlobRequest(draw(hashes), draw(u32), draw(st.integers(1, 128 << 10)))


@st.composite
def blob_blocks(draw: st.DrawFn) -> BlobBlock:
    """Blocks anywhere in a blob, and answers that there is none."""
    if draw(st.booleans()) and draw(st.booleans()):
        return BlobBlock(draw(hashes), 0, 0, b"")
    data = draw(st.binary(min_size=1, max_size=300))
    offset = draw(st.integers(0, 2**32 - 1 - len(data)))
    return BlobBlock(draw(hashes), offset, draw(st.integers(offset + len(data), 2**32 - 1)), data)


@st.composite
def log_slices(draw: st.DrawFn) -> LogSlice:
    """A few consecutive records."""
    first, count = draw(st.integers(0, 2**32 - 10)), draw(st.integers(1, 4))
    return LogSlice(first, tuple(draw(updates(first + i)) for i in range(count)))


receipts = st.builds(Receipt, tags, u32, st.sampled_from(Verdict))
log_requests = st.builds(LogRequest, u32, st.integers(1, 4096), st.booleans())
snapshot_offers = st.builds(SnapshotOffer, u32, u32, u32, st.binary(min_size=32, max_size=32))
fractions = st.floats(0.0, 0.999)
participants = st.sets(st.integers(0, 3000), max_size=60).map(
    lambda ordinals: pack_participants(np.array(sorted(ordinals), dtype=np.int64))
)
optimisers = st.builds(
    OptimiserConfig,
    st.sampled_from(OPTIMISERS),
    fractions,
    fractions,
    st.floats(1e-12, 1.0),
    st.floats(0.0, 10.0),
    st.floats(0.0, 100.0),
    fractions,
)


def _training(*, estimator: Any, k_max: int, adapt_sigma: bool, **values: Any) -> TrainingSettings:
    """Only what has directions can adapt them."""
    adapts = estimator in DEALING_ESTIMATORS
    return TrainingSettings(
        estimator=estimator, k_max=k_max if adapts else 0, adapt_sigma=adapts and adapt_sigma, **values
    )


training_settings = st.builds(
    _training,
    rounds=st.integers(0, 1 << 30),
    directions=st.sampled_from(FAMILIES),
    assignment=st.sampled_from(["shared", "dealt"]),
    estimator=st.sampled_from(ESTIMATORS),
    k=st.integers(1, 60_000),
    tail_k=st.integers(1, 60_000),
    repeats=st.integers(1, 65_535),
    feedback=fractions,
    sigma=st.floats(2.0**-20, 8.0, width=32),
    two_sided=st.booleans(),
    batch=st.integers(1, 1 << 16),
    optimiser=optimisers,
    learning_rate=st.floats(1e-9, 999.0),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 1 << 30),
    decay_every=st.integers(1, 1 << 30),
    decay_factor=st.floats(1e-6, 1.0),
    final_rate=st.floats(0.0, 1.0),
    k_max=st.just(0) | st.just(60_000),
    adapt_sigma=st.booleans(),
)
saliency_settings = st.builds(
    SaliencySettings,
    steps=st.integers(1, 1000),
    samples=st.integers(1, 1 << 16),
    shift=st.floats(1e-6, 9.0),
    draws=st.integers(0, 1024),
    inputs=st.sampled_from(["gaussian", "data"]),
)


@st.composite
def run_settings(draw: st.DrawFn) -> RunSettings:
    """Settings that are valid together."""
    devices = draw(st.integers(1, 100_000))
    return RunSettings(
        seed=draw(st.integers(0, 2**64 - 1)),
        sparsity=draw(fractions),
        saliency=draw(saliency_settings),
        training=draw(training_settings),
        devices=devices,
        quorum=draw(st.integers(1, devices)),
        deadline_s=draw(st.floats(0.01, 1e7)),
        enrol_deadline_s=draw(st.floats(0.01, 1e7)),
        patience=draw(st.integers(1, 1_000_000)),
        evaluate_every=draw(st.integers(0, 1 << 30)),
        scalar_limit=draw(st.floats(1e-3, 1e20)),
        tune_rounds=draw(st.just(0) | st.integers(20, 100_000)),
    )


@st.composite
def announcements(draw: st.DrawFn) -> Announcement:
    """Announcements with or without a mask and a log."""
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        fields |= {"mask_sha256": draw(hashes).hex(), "mask_size": draw(st.integers(1, 1 << 20))}
    if draw(st.booleans()):
        fields |= {"log_length": draw(u32), "log_head": draw(digests).hex(), "weights_digest": draw(digests).hex()}
    fields |= {"k": draw(st.integers(0, 60_000)), "sigma": draw(st.just(0.0) | st.floats(2.0**-20, 8.0, width=32))}
    return Announcement(
        draw(names), draw(u32), draw(st.sampled_from(["enrol", "saliency", "train", "evaluate", "done"])),
        draw(participants), **fields,
    )  # fmt: skip


binary_messages: st.SearchStrategy[BinaryMessage] = st.one_of(
    reports(), updates(), receipts, blob_requests(), blob_blocks(), log_requests, log_slices(), snapshot_offers,
    announcements(),
)  # fmt: skip
documents: st.SearchStrategy[Document] = st.one_of(
    st.builds(ServerPresence, st.booleans(), st.integers(0, 2**64 - 1)),
    st.builds(RunDocument, names, hashes.map(bytes.hex), st.integers(1, 4 << 20), run_settings()),
    st.builds(Hello, u32, texts, st.floats(0.0, 1e6), u32, u32, texts, texts),
    st.builds(
        Presence,
        u32,
        st.sampled_from(["joining", "ready", "done", "refused", "left", "lost"]),
        st.just("") | names,
        texts,
        u32,
        st.just("") | digests.map(bytes.hex),
        st.floats(0.0, 1e6),
    ),
    st.builds(Order, names, st.sampled_from(["welcome", "introduce", "refuse"]), u32, u32, texts),
)
