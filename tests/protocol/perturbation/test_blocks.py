"""Which directions a device gets: every side derives them on its own, and nothing is probed twice."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.device_side.tasks import make_task
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.perturbation.blocks import Block, BlockKind, Deal, blocks_of, deal, directions_of, whole_block
from fedzo.protocol.perturbation.directions import FAMILIES, MAX_POSITION, Directions, Family
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.server_side.run_progress import RunProgress
from fedzo.protocol.settings import Assignment, EstimatorName, RunSettings, TrainingSettings
from fedzo.protocol.wire.documents import Announcement, RunDocument, pack_participants
from fedzo.protocol.wire.framing import MAX_SCALARS
from fedzo.protocol.wire.messages import Report, ReportKind
from tests.protocol.builders import seeded_normals
from tests.protocol.simulation.fakes import cut_manifest, run_document, tiny_manifest

INIT = Initialiser("constant", 0.0)
kinds: st.SearchStrategy[BlockKind] = st.sampled_from(["probe", "sketch"])
families = st.sampled_from(FAMILIES)
assignments: st.SearchStrategy[Assignment] = st.sampled_from(["shared", "dealt"])


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[Block, ...]:
    """One or two neighbours of any kind."""
    sizes = draw(st.lists(st.integers(1, 5_000), min_size=1, max_size=2))
    blocks = []
    for number, size in enumerate(sizes):
        kind = draw(kinds)
        family: Family | Literal["ranked"] = "ranked" if kind == "sketch" else draw(families)
        blocks.append(Block(number, sum(sizes[:number]), size, kind, family, draw(st.integers(1, 60_000))))
    return tuple(blocks)


# --- blocks ---------------------------------------------------------------------------------------------------------


def half_mask() -> Mask:
    """20 of the 40 weights: 14 of the first 28, and 6 of the last 12 behind the cut."""
    layout = tiny_manifest().layout
    scores = np.zeros(layout.size, dtype=np.float32)
    scores[:10] = 1.0
    scores[28:34] = 1.0
    mask = threshold(layout, scores, 1 - 16 / 36)
    assert mask.counts().tolist() == [10, 4, 6]
    return mask


def test_equal_stages_share_scalars_alike_on_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie: with the sum of Python 3.11 and before the last two got 32."""
    layout = Layout(tuple(Parameter(f"w{i}", (n,), True, INIT) for i, n in enumerate((2400, 150, 150))))
    stages = [types.SimpleNamespace(first_parameter=i, end_parameter=i + 1) for i in range(3)]
    monkeypatch.setattr("fedzo.protocol.perturbation.blocks.local_stages", lambda found: found)
    manifest = types.SimpleNamespace(learns_locally=True, stages=stages, model="ties")
    training = TrainingSettings(estimator="local", tail_k=189)
    blocks = blocks_of(training, manifest, Mask.dense(layout))  # type: ignore[arg-type]
    assert [block.k for block in blocks] == [126, 31, 31]


@pytest.mark.parametrize(
    ("estimator", "dense", "half"),
    [
        ("stein", [(0, 0, 40, "probe", "rademacher", 5)], [(0, 0, 20, "probe", "rademacher", 5)]),
        ("coordinate", [(0, 0, 40, "sketch", "ranked", 5)], [(0, 0, 20, "sketch", "ranked", 5)]),
        (
            "split",
            [(0, 0, 28, "probe", "rademacher", 5), (1, 28, 12, "probe", "rademacher", 9)],
            [(0, 0, 14, "probe", "rademacher", 5), (1, 14, 6, "probe", "rademacher", 9)],
        ),
        (
            "node",
            [(0, 0, 28, "probe", "rademacher", 5), (1, 28, 12, "sketch", "ranked", 9)],
            [(0, 0, 14, "probe", "rademacher", 5), (1, 14, 6, "sketch", "ranked", 9)],
        ),
    ],
)
def test_blocks_of_an_estimator(estimator: EstimatorName, dense: list[Any], half: list[Any]) -> None:
    training = TrainingSettings(estimator=estimator, directions="rademacher", k=5, tail_k=9)
    manifest = cut_manifest()
    found = blocks_of(training, manifest, Mask.dense(manifest.layout))
    assert [dataclasses.astuple(block) for block in found] == dense
    assert [dataclasses.astuple(block) for block in blocks_of(training, manifest, half_mask())] == half


def test_split_and_node_follow_their_own_cuts() -> None:
    manifest = cut_manifest()
    assert manifest.cut is not None
    early = dataclasses.replace(manifest, cut=dataclasses.replace(manifest.cut, first_parameter=1))
    mask = Mask.dense(manifest.layout)
    sizes = {}
    for estimator in ("split", "node"):
        training = TrainingSettings(estimator=estimator)
        sizes[estimator] = [block.size for block in blocks_of(training, early, mask)]
    assert sizes == {"split": [24, 16], "node": [28, 12]}


@pytest.mark.parametrize(
    ("estimator", "without"),
    [
        ("split", {"cut": None}),
        ("node", {"tail": None}),
        ("split", {"cut": None, "tail": None}),
        ("node", {"cut": None, "tail": None}),
    ],
)
def test_an_estimator_needs_its_cut(estimator: EstimatorName, without: dict[str, None]) -> None:
    manifest = dataclasses.replace(cut_manifest(), **without)  # type: ignore[arg-type]
    mask = Mask.dense(manifest.layout)
    with pytest.raises(ConfigError, match=f"{estimator} needs .*tiny has none") as caught:
        blocks_of(TrainingSettings(estimator=estimator), manifest, mask)
    assert "--estimator stein" in caught.value.hint
    assert len(blocks_of(TrainingSettings(), manifest, mask)) == 1
    settings = RunSettings(training=TrainingSettings(estimator=estimator))
    with pytest.raises(ConfigError, match="needs"):  # the server, before it begins
        RunProgress(RunDocument("r", bytes(32).hex(), 1, settings), manifest)


def test_positions_of_a_sketch_are_places_in_its_ranking() -> None:
    """They begin at 0 in every round; the ranking tells the coordinates, and a task has these."""
    manifest = cut_manifest()
    run = run_document(RunSettings(training=TrainingSettings(estimator="node", tail_k=5)))
    mask = Mask.dense(manifest.layout)
    blocks = blocks_of(run.training, manifest, mask)
    replica = Replica(manifest.layout, mask, manifest.seed, 1, blocks, run.training.optimiser)
    assert [one.first for one in deal(replica.blocks, "dealt", 7, 3)][1] == 0
    head = Announcement("run", 1, "train", pack_participants(np.arange(3)))
    task = make_task(run, head, 1, 1, replica)
    assert task is not None
    np.testing.assert_array_equal(task.positions[1], replica.coordinates(1, 5))


def test_blocks_have_streams_of_their_own() -> None:
    blocks = (Block(0, 0, 64, "probe", "rademacher", 1), Block(1, 64, 64, "probe", "rademacher", 1))
    bases = [basis for basis in directions_of(blocks, 9) if isinstance(basis, Directions)]
    for block, basis in zip(blocks, bases, strict=True):
        alone = Directions("rademacher", 9, 64, block.number)
        found, wanted = (b.direction(3, 5, np.empty(64, np.float32)).tobytes() for b in (basis, alone))
        assert found == wanted
    first, second = (basis.direction(3, 5, np.empty(64, np.float32)) for basis in bases)
    assert not np.array_equal(first, second)


# --- a round --------------------------------------------------------------------------------------------------------


@given(
    blocks=block_lists(),
    assignment=assignments,
    step=st.integers(0, 2**32 - 1),
    n_devices=st.integers(1, 300),
)
def test_slots_are_disjoint_and_without_gaps(
    blocks: tuple[Block, ...], assignment: Assignment, step: int, n_devices: int
) -> None:
    deals = deal(blocks, assignment, step, n_devices)
    assert [one.block for one in deals] == list(blocks)
    assert sum(one.k for one in deals) <= MAX_SCALARS  # a report holds them
    assert sum(one.k * one.n_slots for one in deals) <= MAX_SCALARS  # and an update those of all
    for one in deals:
        slots = [one.slot(rank) for rank in range(n_devices)]
        assert set(slots) == set(range(one.n_slots))
        parts = [one.positions(slot) for slot in range(one.n_slots)]
        assert all(part.dtype == np.int64 and part.size == one.k for part in parts)
        together = np.concatenate(parts)
        assert np.array_equal(together, np.arange(one.first, one.first + one.n_slots * one.k))
        assert 0 <= one.first < one.block.n_positions
        assert together[-1] < MAX_POSITION
        rows = together % one.block.n_positions
        if one.n_slots <= one.block.n_positions:
            assert np.unique(rows).size == rows.size  # no direction twice in a round
        assert 1 <= one.k <= one.block.k


@given(blocks=block_lists(), assignment=assignments, n_devices=st.integers(1, 50))
def test_sketches_are_always_shared(blocks: tuple[Block, ...], assignment: Assignment, n_devices: int) -> None:
    """Scalars of a sketch are added up, so they must be coordinates along the same rows."""
    for one in deal(blocks, assignment, 3, n_devices):
        shared = assignment == "shared" or one.block.kind == "sketch"
        assert one.n_slots == (1 if shared else n_devices)
        assert len({one.slot(rank) for rank in range(n_devices)}) == one.n_slots


@pytest.mark.parametrize("n", [1, 2, 5])
def test_dealt_slots_rotate(n: int) -> None:
    for rank in range(n):
        slots = {deal(whole_block("gaussian", 9, 3), "dealt", step, n)[0].slot(rank) for step in range(n)}
        assert slots == set(range(n))


@pytest.mark.parametrize(
    ("k", "n_devices", "family", "size", "expected"),
    [
        (64, 8, "hadamard", 65_536, 64),
        (64, 2_000, "hadamard", 65_536, 30),
        (64, 8, "hadamard", 64, 8),
        (64, 8, "hadamard", 33, 8),
        (64, 100, "hadamard", 64, 1),
        (60_000, 1, "gaussian", 10, 60_000),
        (60_000, 7, "rademacher", 10, 8_571),
    ],
)
def test_how_many_directions_a_device_gets(k: int, n_devices: int, family: Family, size: int, expected: int) -> None:
    (dealt,) = deal(whole_block(family, size, k), "dealt", 0, n_devices)
    assert (dealt.k, dealt.n_slots) == (expected, n_devices)
    (shared,) = deal(whole_block(family, size, k), "shared", 0, n_devices)
    assert (shared.k, shared.n_slots) == (min(k, shared.block.n_positions), 1)


def test_two_blocks_share_the_room_of_a_message() -> None:
    blocks = (Block(0, 0, 9, "probe", "gaussian", 60_000), Block(1, 9, 1 << 16, "sketch", "ranked", 60_000))
    assert [one.k for one in deal(blocks, "dealt", 0, 1)] == [30_000, 30_000]
    assert [one.k for one in deal(blocks, "dealt", 0, 100)] == [300, 30_000]


# --- the walk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignment", ["shared", "dealt"])
@pytest.mark.parametrize(
    ("size", "k", "n_devices"), [(64, 4, 4), (100, 5, 3), (33, 7, 5), (5, 64, 2), (1, 1, 1), (200, 9, 1)]
)
def test_the_walk_visits_every_row_once_a_lap(size: int, k: int, n_devices: int, assignment: Assignment) -> None:
    """While the fleet stays the same; laps follow each other without a gap."""
    blocks = whole_block("hadamard", size, k)
    directions = Directions("hadamard", 7, size)
    walked: list[int] = []
    laps = 3
    for step in range(10_000):
        (one,) = deal(blocks, assignment, step, n_devices)
        for slot in range(one.n_slots):
            walked += directions.rows(one.positions(slot)).tolist()
        if len(walked) >= laps * directions.padded:
            break
    first, *others = np.array(walked[: laps * directions.padded]).reshape(laps, directions.padded)
    assert sorted(first.tolist()) == list(range(directions.padded))
    assert all(np.array_equal(lap, first) for lap in others)


@given(step=st.integers(0, 2**31), n_devices=st.integers(1, 200), k=st.integers(1, 500), family=families)
def test_rounds_follow_each_other(step: int, n_devices: int, k: int, family: Family) -> None:
    blocks = whole_block(family, 3_000, k)
    now, then = (deal(blocks, "dealt", s, n_devices)[0] for s in (step, step + 1))
    period = blocks[0].n_positions
    assert then.first == (now.first + now.n_slots * now.k) % period


# --- both sides -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    estimator=st.sampled_from(["stein", "split", "node", "coordinate"]),
    assignment=assignments,
    family=families,
    ordinals=st.sets(st.integers(0, 500), min_size=1, max_size=12),
    updates=st.integers(0, 3),
    k=st.integers(1, 70),
)
def test_both_sides_derive_the_same_positions(
    estimator: EstimatorName, assignment: Assignment, family: Family, ordinals: set[int], updates: int, k: int
) -> None:
    """The server from its journal, a device from the announcement; an update carries what the devices probed."""
    manifest = cut_manifest()
    training = TrainingSettings(
        estimator=estimator, assignment=assignment, directions=family, k=k, tail_k=1 + k // 2, rounds=9
    )
    run = dataclasses.replace(run_document(RunSettings(seed=8)), settings=RunSettings(seed=8, training=training))
    server = RunProgress(run, manifest)
    mask = Mask.dense(manifest.layout)
    device = Replica(manifest.layout, mask, manifest.seed, 8, blocks_of(training, manifest, mask), training.optimiser)
    members = sorted(ordinals)
    for round_ in range(1, updates + 2):
        head = Announcement("run-1", round_, "train", pack_participants(np.array(members)), log_length=device.index)
        tasks = [make_task(run, head, ordinal, 1, device) for ordinal in members]
        reports = []
        for rank, task in enumerate(tasks):
            assert task is not None
            assert task.kind is ReportKind.PROBE
            scalars = tuple(seeded_normals(1, rank, part.size) for part in task.positions)
            reports.append((rank, Report(task.kind, run.tag, round_, 1, 5, device.digest, 0.0, 1, 1, 1, scalars)))
        dealt: list[Deal] = list(server.deals(head))
        for rank, task in enumerate(tasks):
            assert task is not None
            for one, part in zip(dealt, task.positions, strict=True):
                if one.block.kind == "sketch":
                    assert np.array_equal(server.replica.coordinates(one.block.number, one.k), part)
                else:
                    assert np.array_equal(one.positions(one.slot(rank)), part)
        probed = {
            one.block.offset + int(position) for one in dealt for slot in map(one.slot, range(len(tasks)))
            for position in one.positions(slot)
        }  # fmt: skip
        record = server.make_update(head, reports)
        assert set(record.positions().tolist()) == probed
        device.apply(record)
    assert device.digest == server.replica.digest


@pytest.mark.parametrize("phase", ["enrol", "saliency", "evaluate", "done"])
def test_other_phases_deal_nothing(phase: Any) -> None:
    progress = RunProgress(run_document(RunSettings()), tiny_manifest())
    head = Announcement("run-1", 1, phase, pack_participants(np.arange(3)))
    assert progress.deals(head) == ()
