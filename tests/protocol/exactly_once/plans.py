"""What a schedule is about: settings of a run, boards with their flaws, and how bad the network is.

A plan is a function of its number. :data:`FEATURES` is the table that plans are drawn from: each row changes settings
in one way, so that what is added to the protocol needs one row here to meet every fault.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings, Clip, RuleName
from fedzo.protocol.settings import PruningMethod, RunSettings, SaliencySettings, TrainingSettings

__all__ = ["FEATURES", "Board", "Plan", "Weather", "plan_of"]

Changes = dict[str, Any]


@dataclass(frozen=True)
class Board:
    """One device of a plan.

    Attributes:
        fits: The largest micro-batch that does not need more memory than it has.
        opens: Whether too large a micro-batch shows only when it computes.
        answers: What it reports: ``honest``, ``wrong`` scores while scoring, ``hostile`` reports that have to be
            refused, or ``declines`` every task.
        has_graphs: Whether an earlier run left the graphs in its store.
        comes_late: Whether it is started only when the first storm is over.
        query_ms: How long a query takes.
    """

    fits: int = 8
    opens: bool = True
    answers: str = "honest"
    has_graphs: bool = True
    comes_late: bool = False
    query_ms: int = 10

    @property
    def counts(self) -> bool:
        """Whether a round can close with it."""
        return self.fits > 0 and self.answers == "honest"


@dataclass(frozen=True)
class Weather:
    """How bad things are; chances a step.

    Attributes:
        course: Steps of calm and of storm, in turns.
        fault: A node dies, a link breaks, the broker restarts, a clock jumps.
        tick: Time passes for somebody, whatever is on its way.
        drop: A delivery is lost.
        duplicate: It comes once more.
        reorder: It overtakes others.
        server_session: Whether the broker keeps the server's session while it is away.
        server_queues: Whether the server's transport keeps what it publishes without a link.
        batch: Events that the server takes in one transaction.
        late_faults: Faults after everything was mended, each over at once.
    """

    course: tuple[tuple[int, int], ...] = ((100, 100),)
    fault: float = 0.02
    tick: float = 0.08
    drop: float = 0.05
    duplicate: float = 0.1
    reorder: float = 0.5
    server_session: bool = True
    server_queues: bool = True
    batch: int = 1
    late_faults: int = 3


@dataclass(frozen=True)
class Plan:
    """Everything but the course of events.

    Attributes:
        number: What it was drawn from.
        settings: Of the run.
        boards: The devices.
        weather: What happens to them.
        has_test_set: Whether the server evaluates.
        features: Rows of the table that were drawn.
        snapshot_every: Updates between snapshots in the journal; 0 for as seldom as in a real run.
    """

    number: int
    settings: RunSettings
    boards: tuple[Board, ...]
    weather: Weather
    has_test_set: bool
    features: tuple[str, ...]
    snapshot_every: int = 0


def _pruned(source: random.Random) -> Changes:
    checks = source.choice([0, 1, 8])
    scores = SaliencySettings(steps=source.randint(1, 2), samples=16, draws=source.randint(0, 1), checked=checks)
    return {"sparsity": 0.5, "saliency": scores}


def _scored_on_data(_: random.Random) -> Changes:
    return {"sparsity": 0.5, "saliency": SaliencySettings(steps=1, samples=16, inputs="data")}


def _mask_of_the_server(source: random.Random) -> Changes:
    methods: tuple[PruningMethod, ...] = ("magnitude", "random", "erk", "synflow")
    method = source.choice(methods)
    return {"sparsity": 0.5, "saliency": SaliencySettings(method=method, steps=1)}


def _estimator(source: random.Random) -> Changes:
    return {"estimator": source.choice(["split", "node", "coordinate"]), "k": 3, "tail_k": source.randint(3, 8)}


def _shared(source: random.Random) -> Changes:
    return {"assignment": "shared", "directions": source.choice(["rademacher", "gaussian", "hadamard"])}


def _average(source: random.Random) -> Changes:
    return {"optimiser": OptimiserConfig(source.choice(["adam", "sgd"]), ema=0.75)}


def _rule(source: random.Random) -> Changes:
    rules: tuple[RuleName, ...] = ("median", "sign-vote", "centred-clip")
    clips: tuple[Clip, ...] = ("none", "norm")
    rule = AggregationSettings(source.choice(rules), clip=source.choice(clips))
    return {"assignment": "shared", "aggregation": rule}


FEATURES: dict[str, tuple[float, Callable[[random.Random], Changes]]] = {
    "scoring rounds, checked": (0.2, _pruned),
    "scoring rounds on data": (0.05, _scored_on_data),
    "mask of the server": (0.1, _mask_of_the_server),
    "estimator": (0.15, _estimator),
    "shared directions": (0.3, _shared),
    "average of the weights": (0.3, _average),
    "adaptive K": (0.25, lambda _: {"k_max": 9}),
    "adaptive sigma": (0.15, lambda _: {"adapt_sigma": True}),
    "local steps": (0.15, lambda _: {"k": 4, "local_steps": 2, "local_rate": 0.01, "estimator": "stein"}),
    "two-sided": (0.1, lambda _: {"two_sided": True}),
    "participants": (0.25, lambda source: {"participants": source.randint(2, 3)}),
    "evaluations": (0.4, lambda source: {"evaluate_every": source.randint(1, 2)}),
    "little patience": (0.2, lambda _: {"patience": 2}),
    "late reports": (0.3, lambda source: {"staleness": source.randint(1, 3)}),
    "fewer directions for slow boards": (0.2, lambda source: {"k": 4, "k_min": source.randint(1, 2)}),
    "enough are enough": (0.3, lambda source: {"close_at": source.randint(1, 3)}),
    "weights for late boards": (0.2, lambda _: {"snapshots": True, "rounds": 6, "optimiser": OptimiserConfig("sgd")}),
    "rule of aggregation": (0.15, _rule),
    "removed weights keep their values": (0.1, lambda _: {"fill": "init"}),
}
"""How often a row is drawn, and what it changes; a later row wins."""


def plan_of(number: int) -> Plan:
    """The plan with this number."""
    source = random.Random(f"plan {number}")
    features = tuple(name for name, (chance, _) in FEATURES.items() if source.random() < chance)
    changes: Changes = {}
    for name in features:
        changes |= FEATURES[name][1](source)
    boards = _boards(source)
    counting = sum(board.counts and not board.comes_late for board in boards)
    n_devices = sum(not board.comes_late for board in boards)
    participants = min(changes.pop("participants", 0), n_devices)
    # Whoever is sampled beside those that count: a round must be able to reach its quorum.
    least = max(1, participants - (len(boards) - counting)) if participants else counting
    quorum = source.randint(1, min(least, counting))
    if changes.pop("fill", "zero") == "init" and changes.get("sparsity"):
        changes["fill"] = "init"
    if changes.keys() & {"k_max", "aggregation"}:
        changes["staleness"] = 0
    if changes.keys() & {"local_steps"} or changes.get("assignment") or changes.get("estimator") == "coordinate":
        changes["k_min"] = 0
    if changes.get("close_at"):
        changes["close_at"] = max(quorum, min(changes["close_at"], participants or n_devices))
    training = TrainingSettings(
        rounds=source.randint(1, 4), k=2, learning_rate=0.05, directions=source.choice(["rademacher", "hadamard"])
    )
    mine = {name: changes.pop(name) for name in list(changes) if hasattr(training, name)}
    if mine.get("estimator") == "coordinate":  # it has no directions that could adapt
        mine = {name: value for name, value in mine.items() if name not in ("k_max", "adapt_sigma")}
    training = dataclasses.replace(training, **mine)
    defaults: Changes = {"sparsity": 0.0, "evaluate_every": 0, "patience": 1_000}
    settings = RunSettings(
        seed=source.randrange(100),
        training=training,
        devices=n_devices,
        quorum=quorum,
        participants=participants,
        deadline_s=8.0,
        enrol_deadline_s=30.0,
        **(defaults | changes),
    )
    snapshot_every = source.choice([0, 1, 2])
    return Plan(number, settings, boards, _weather(source), source.random() < 0.5, features, snapshot_every)


def _boards(source: random.Random) -> tuple[Board, ...]:
    boards = []
    for number in range(source.choice([2, 3, 3, 3, 4])):
        flawed = number > 0 and source.random() < 0.25
        answers = source.choice(["wrong", "hostile", "declines", "honest", "honest"]) if flawed else "honest"
        fits = source.choice([0, 1, 3]) if flawed and answers == "honest" else 8
        late = number > 0 and source.random() < 0.1
        query_ms = source.choice([10, 10, 40])
        boards.append(Board(fits, source.random() < 0.5, answers, source.random() < 0.9, late, query_ms))
    return tuple(boards)


def _weather(source: random.Random) -> Weather:
    return Weather(
        course=tuple(
            (source.choice([0, 100, 200, 300]), source.choice([40, 120, 300])) for _ in range(source.randint(1, 3))
        ),
        fault=source.choice([0.0, 0.01, 0.03, 0.08]),
        tick=source.choice([0.01, 0.05, 0.15]),
        drop=source.choice([0.0, 0.03, 0.15]),
        duplicate=source.choice([0.0, 0.1, 0.3]),
        reorder=source.choice([0.0, 0.3, 1.0]),
        server_session=source.random() < 0.7,
        server_queues=source.random() < 0.7,
        batch=source.choice([1, 1, 4]),
        late_faults=source.choice([0, 3, 8]),
    )
