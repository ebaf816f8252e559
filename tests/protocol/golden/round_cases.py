"""Golden vectors of rounds with slow, late, lost and new devices, for the known answers in rounds.json.

Run as a module it prints them as JSON, under whatever numpy it finds; with ``--write`` it writes rounds.json anew.
That is only for a deliberate change of the contract, like ``make.py``. Needs numpy and fedzo.protocol only.

What every side replays follows from the log alone. The coefficients of late reports are the server's own, but a server
that goes on elsewhere, and a replay of a journal, must find the same ones.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.perturbation.blocks import Block, Deal, deal, whole_block
from fedzo.protocol.replay.optimisers import OptimiserConfig, OptimiserName
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.server_side.pace import paced_levels, pack_levels, unpack_levels
from fedzo.protocol.server_side.roster import Member
from fedzo.protocol.server_side.selection import select
from fedzo.protocol.server_side.staleness import Group, combine_groups
from fedzo.protocol.settings import Assignment, RunSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Hello
from fedzo.protocol.wire.framing import run_tag
from fedzo.protocol.wire.messages import Receipt, Report, ReportKind, UpdateRecord
from fedzo.protocol.wire.scalar_rows import round_to_halves
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import LogRequest, SnapshotOffer
from tests.protocol.builders import seeded_coefficients, seeded_normals
from tests.protocol.golden.cases import BLOCK_REPLAYS, replay_layout, sha256
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change

Json = Any
ROUNDS = Path(__file__).with_name("rounds.json")
SPLIT, NODE = BLOCK_REPLAYS[0][1], BLOCK_REPLAYS[1][1]
UPDATES = 60
STALENESS = 3
# (name, blocks, optimiser, its constants).
LATE_REPLAYS: tuple[tuple[str, tuple[Block, ...], OptimiserName, dict[str, float]], ...] = (
    ("hadamard+adam", whole_block("hadamard", 2_003, 16), "adam", {}),
    ("gaussian+sign_momentum", whole_block("gaussian", 1_003, 4), "sign_momentum", {}),
    ("split+hadamard+sgd", SPLIT, "sgd", {"front_rate": 0.3, "ema": 0.98}),
    ("node+rademacher+adam", NODE, "adam", {}),
    ("node+rademacher+momentum", NODE, "momentum", {"ema": 0.9}),
)


# --- what every side replays ------------------------------------------------------------------------------------------


def late_segments(blocks: tuple[Block, ...], index: int) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Segments and ages of an update: some rounds before it have late scalars, and at times nothing is fresh."""
    older = [age for age in range(1, min(index, STALENESS) + 1) if (index + age) % 3]
    present = older if older and index % 7 == 3 else [0, *older]
    segments, ages = [], []
    for block in blocks:
        for age in present:
            one = deal(blocks, "dealt", index - age, 4, n_rounds=1 + STALENESS)[block.number]
            # Two of the devices, with a gap between them; a sketch has the same coordinates for all.
            places = (
                [(block.offset, one.k)] if one.n_slots == 1 else [(block.offset + one.start(s), one.k) for s in (0, 2)]
            )
            segments += places
            ages += [age] * len(places)
    return tuple(segments), tuple(ages) if any(ages) else ()


def prepare_late(replica: Replica, updates: int) -> list[UpdateRecord]:
    """Updates with late scalars up to that many; rounds are not numbered like records, as some made no update."""
    out = []
    for index in range(replica.index, updates):
        segments, ages = late_segments(replica.blocks, index)
        coefficients = seeded_coefficients(5, index, sum(count for _, count in segments))
        round_ = 1 + index + index // 4
        rate = float(np.float32(0.01) / np.float32(1 + index // 50))
        out.append(replica.prepare(index, round_, rate, segments, coefficients, ages))
    return out


def late_replays() -> Json:
    """Weights, their average, log and snapshots of logs with late scalars.

    The second replica comes in the middle, gets a snapshot, and replays the records after it.
    """
    out = {}
    for name, blocks, optimiser, constants in LATE_REPLAYS:
        layout, mask = replay_layout(sum(block.size for block in blocks))
        config = OptimiserConfig(optimiser, weight_decay=0.01, **constants)
        server, joiner = (Replica(layout, mask, 1, 2, blocks, config, STALENESS) for _ in range(2))
        prepare_late(server, UPDATES // 2)
        snapshot = server.snapshot()
        records = prepare_late(server, UPDATES)
        joiner.restore(snapshot)
        for record in records:
            joiner.apply(record)
        out[name] = {
            "snapshot": hashlib.sha256(snapshot).hexdigest(),
            "weights": server.digest.hex(),
            "evaluated": server.evaluated()[1].hex(),
            "head": server.head.hex(),
            "last snapshot": hashlib.sha256(server.snapshot()).hexdigest(),
            "of who came late": hashlib.sha256(joiner.snapshot()).hexdigest(),
        }
    return out


# --- what the server decides ------------------------------------------------------------------------------------------


def _report(samples: int, rows: list[NDArray[np.float32]]) -> Report:
    return Report(ReportKind.PROBE, run_tag("run-1"), 1, 1, samples, bytes(16), 0.5, 3, 10, 100, tuple(rows))


def _group(age: int, deals: tuple[Deal, ...], ranks: range, value: Callable[[int, Deal, int], Any]) -> Group:
    """Reports of a round; ``value`` gives the scalars of a device for one of its deals."""
    return Group(
        age,
        deals,
        tuple(
            (r, _report(1 + r % 5, [np.asarray(value(r, d, d.size(d.slot(r))), np.float32) for d in deals]))
            for r in ranks
        ),
    )


def late_weights() -> Json:
    """What a scalar of 1 becomes, by its age: first of each block and age; and coefficients of many seeded reports."""
    out: dict[str, Json] = {}
    for assignment in get_args(Assignment):
        for power in (0.0, 0.5, 1.0, 2.75):
            groups = [
                _group(age, deal(NODE, assignment, 40 - age, 3), range(age % 3, 3), lambda r, d, n: np.ones(n))
                for age in (0, 1, 2, 5, 30)
            ]
            segments, coefficients, ages = combine_groups(groups, AggregationSettings(), power)
            starts = np.cumsum([0, *(count for _, count in segments)])
            out[f"{assignment} {power}"] = [
                f"{first} + {count}, age {age}: {float(coefficients[start])!r}"
                for (first, count), age, start in zip(segments, ages, starts[:-1], strict=True)
            ]
        for name, blocks in (("split", SPLIT), ("node", NODE)):
            groups = [
                _group(
                    age,
                    deal(blocks, assignment, 900 - age, 40, n_rounds=6),
                    range(age * 5, 40 - age),
                    lambda r, d, n, age=age: seeded_normals(7 + age, 100 * d.block.number + r, n),  # type: ignore[misc]
                )
                for age in (0, 1, 4)
            ]
            segments, coefficients, ages = combine_groups(groups, AggregationSettings(), 0.5)
            places = np.array([(*segment, age) for segment, age in zip(segments, ages, strict=True)], np.int64)
            out[f"{assignment} {name}"] = [sha256(places), sha256(coefficients)]
    return out


def paced() -> Json:
    """Levels by measured times, and the slots of rounds with levels."""
    hello = Hello(1, "tests", 64.0, 1, 0, "", "")
    out: dict[str, Json] = {}
    for times, k, k_min in (
        ((1.0, 1.0, 8.0, 0.0), 64, 4),
        ((3.0, 40.0, 900.0, 1e9, 1.0), 60_000, 1),
        ((1.0, 1.25, 1.2500001, 2.5, 2.6, 5.0), 64, 3),
    ):
        members = [Member(f"dev-{i}", i, hello, query_ms=each) for i, each in enumerate(times)]
        out[f"levels of {times}, {k_min} to {k}"] = paced_levels(members, k, k_min)
    levels = (0, 3, 1, 15, 0, 2)
    assert unpack_levels(pack_levels(levels), 6) == levels
    for blocks, name in ((SPLIT, "split"), (NODE, "node")):
        for step, n_rounds in ((0, 1), (5, 1), (70_001, 4)):
            dealt = deal(blocks, "dealt", step, 6, n_rounds=n_rounds, k_min=3, levels=levels)
            out[f"{name} {step} {n_rounds}"] = [
                [f"{one.block.offset + one.start(s)} + {one.size(s)}" for s in map(one.slot, range(6))] for one in dealt
            ]
    return out


def selections() -> Json:
    """Who is asked: ordinals, by round, wanted and most; some devices are not ready."""
    hello = Hello(1, "tests", 64.0, 1, 0, "", "")
    ready = [Member(f"dev-{i}", i, hello) for i in range(60) if i % 7 != 3]
    return {
        f"round {round_}, {wanted} of {len(ready)}, at most {most}": [
            member.ordinal for member in select(9, round_, ready, wanted=wanted, most=most)
        ]
        for round_, wanted, most in ((1, 13, 100), (2, 13, 100), (2**31, 13, 100), (4, 0, 20), (5, 0, 20), (6, 30, 20))
    }


# --- whole runs -------------------------------------------------------------------------------------------------------


class SeededDesk(Desk):
    """A coordinator whose devices send seeded scalars: no loss is computed, so nothing depends on a BLAS."""

    def answer(self, name: str, task: Task) -> Outcome:
        """Normals; small enough for both ends of a record's coefficients."""
        if task.kind is ReportKind.EVALUATE:
            return Outcome((np.array([4.0, 6.0, 8.0], np.float32),), 8, 0.5)
        blocks = []
        for block, positions in zip(self.machine.replica.blocks, task.positions, strict=True):
            values = seeded_normals(20 + NAMES.index(name), 10 * task.round + block.number, len(positions))
            blocks.append(round_to_halves(values) if block.kind == "sketch" else values)
        return Outcome(tuple(blocks), 3 + NAMES.index(name), 0.5, queries=9)


# (name, settings, how long each device takes for a round).
_AVERAGED = OptimiserConfig("adam", ema=0.9)
_FOUR = change(SETTINGS, rounds=24, k=3, tail_k=5, evaluate_every=5)
RUNS: tuple[tuple[str, RunSettings, tuple[int, ...]], ...] = (
    ("over-selected", replace(_FOUR, participants=3, close_at=2), (1, 2, 3, 5)),
    ("over-selected, late", replace(_FOUR, participants=3, close_at=2, staleness=2), (1, 2, 3, 5)),
    ("buffered asynchronous", replace(_FOUR, close_at=2, staleness=4), (1, 2, 3, 7)),
    (
        "buffered asynchronous, node",
        change(_FOUR, close_at=2, staleness=4, estimator="node", optimiser=_AVERAGED),
        (2, 1, 3, 7),
    ),
    ("buffered asynchronous, shared", change(_FOUR, close_at=3, staleness=1, assignment="shared"), (1, 2, 2, 4)),
    ("paced", change(_FOUR, k=16, k_min=2), (1, 1, 2, 9)),
    ("paced, late, split", change(_FOUR, k=16, k_min=2, staleness=2, close_at=3, estimator="split"), (1, 1, 2, 9)),
)


def play(settings: RunSettings, times: tuple[int, ...]) -> tuple[SeededDesk, Counter[str], bytes]:
    """A whole run of four devices, each of which measures at the weights that it sees when it begins.

    Returns:
        The desk at the end, what the devices were told, and the snapshot that a device was offered on the way.
    """
    desk = SeededDesk(replace(settings, snapshots=True))
    desk.connect().join()
    verdicts: Counter[str] = Counter()
    busy: dict[str, tuple[int, Report]] = {}
    begun = dict.fromkeys(NAMES, 0)
    snapshot = b""
    for now in range(10_000):
        for name, (end, report) in sorted(busy.items()):
            if end == now:
                del busy[name]
                desk.say(name, report, Channel.REPORT)
                verdicts.update(receipt.verdict.name for receipt in desk.sent(Receipt))
        if desk.head.phase == "done":
            break
        for name, time in zip(NAMES, times, strict=True):
            if name not in busy and name in desk.participants() and begun[name] < desk.head.round:
                begun[name] = desk.head.round
                busy[name] = now + time, desk.measure(name, elapsed_ms=900 * time)
        if not snapshot and desk.machine.replica.index >= settings.training.rounds // 2:
            desk.say("a", LogRequest(0, 100))
            if desk.sent(SnapshotOffer):
                snapshot = desk.machine.replica.snapshot()
    return desk, verdicts, snapshot


def runs() -> Json:
    """What whole runs come to: who was told what, how old the scalars were, and the bits.

    A device with the log, and one with the snapshot and the records after it, end where the server does.
    """
    out = {}
    for name, settings, times in RUNS:
        desk, verdicts, snapshot = play(settings, times)
        records = [decode(payload) for kind, _, _, payload in desk.journal if kind == "update"]
        from_log, from_snapshot = (SeededDesk(desk.settings).machine.replica for _ in range(2))
        from_snapshot.restore(snapshot)
        for replica in (from_log, from_snapshot):
            for record in records[replica.index :]:
                assert isinstance(record, UpdateRecord)
                replica.apply(record)
        ages = Counter(age for r in records if isinstance(r, UpdateRecord) for age in r.ages or [0] * len(r.segments))
        out[name] = {
            "updates": desk.machine.replica.index,
            "verdicts": dict(sorted(verdicts.items())),
            "segments by age": {str(age): count for age, count in sorted(ages.items())},
            "snapshot": hashlib.sha256(snapshot).hexdigest(),
            "weights": desk.machine.replica.digest.hex(),
            "head": desk.machine.replica.head.hex(),
            "from the log": from_log.head.hex(),
            "from the snapshot": from_snapshot.head.hex(),
        }
    return out


CASES: dict[str, Callable[[], Json]] = {
    "late replays": late_replays,
    "late weights": late_weights,
    "paced": paced,
    "selections": selections,
    "runs": runs,
}


def compute() -> Json:
    """All of them as plain data."""
    return {name: case() for name, case in CASES.items()}


if __name__ == "__main__":
    text = json.dumps(compute(), indent=1)
    if "--write" in sys.argv[1:]:
        ROUNDS.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)  # noqa: T201
