"""Whole runs through lost, repeated, late and reordered messages, crashes, partitions and brokers that forget.

A run is a function of its seed; FEDZO_FAULT_RUNS sets how many are tried.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import pytest

from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings, RuleName
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from tests.protocol.simulation.desk import check_order
from tests.protocol.simulation.fakes import optional_graph, run_document
from tests.protocol.simulation.network import Faults, Node
from tests.protocol.simulation.nodes import ServerNode
from tests.protocol.simulation.world import World, check_end

RUNS = int(os.environ.get("FEDZO_FAULT_RUNS", "40"))
FAULTY_S = 300.0
ROUNDS, LAST_ROUNDS = 15, 5


def settings_of(seed: int) -> RunSettings:
    """Settings that differ from seed to seed in everything that changes the course of a round."""
    steps = (0, 1, 3)[seed % 3]
    is_shared, staleness = seed // 2 % 2 == 1, (0, 3, 0, 1)[seed // 4 % 4] if seed % 4 > 1 else 0
    rules: tuple[RuleName, ...] = ("median", "centred-clip", "sign-vote", "mean")
    return RunSettings(
        seed=seed,
        sparsity=0.6 if steps else 0.0,
        saliency=SaliencySettings(steps=max(1, steps), samples=16, draws=seed % 2),
        training=TrainingSettings(
            rounds=ROUNDS,
            directions=("hadamard", "rademacher", "gaussian")[seed // 3 % 3],
            assignment="shared" if is_shared else "dealt",
            estimator=("stein", "node", "split", "stein", "stein")[seed % 5],
            k=5,
            tail_k=3 + seed % 9,
            learning_rate=0.05,
            k_max=15 if seed % 4 < 2 else 0,
            k_min=1 + seed % 3 if seed // 2 % 2 == 0 else 0,
            adapt_sigma=seed % 7 == 0,
            schedule=("cosine", "linear", "step")[seed % 3],
            warmup=seed % 5,
            optimiser=OptimiserConfig(("adam", "sgd")[seed // 4 % 2], ema=0.9 * (seed % 3 > 0), front_rate=0.5),
        ),
        devices=4,
        quorum=2 + seed % 2,
        close_at=3 if seed % 6 == 1 else 0,
        staleness=staleness,
        aggregation=AggregationSettings(rules[seed // 8 % 3 if is_shared and not staleness else 3]),
        snapshots=seed % 3 == 1,
        deadline_s=8.0,
        enrol_deadline_s=30.0,
        patience=1_000,
        evaluate_every=2,
    )


def is_faulty(world: World) -> bool:
    """Whether things still go wrong: until a few rounds before the end, as who is away when a run ends stays behind."""
    return world.now < FAULTY_S and world.server.coordinator.replica.index < ROUNDS - LAST_ROUNDS


def misfortune(world: World) -> None:
    """Something bad happens to somebody, again and again."""
    if not is_faulty(world):
        return
    source = world.random
    node: Node = source.choice(list(world.nodes()))
    kind = source.randrange(7)
    if kind == 0:
        world.crash(node)
    elif kind == 1:
        world.break_link(node, source.uniform(0.1, 12))
    elif kind == 2:
        world.crash(world.server)
    elif kind == 3:
        world.restart_broker(keep_retained=source.random() < 0.5)
    elif kind == 4:
        node.clock_ahead_s += source.choice([0.5, 10.0, 100.0])
    elif kind == 5:
        world.faults = Faults(
            drop=source.choice([0.0, 0.05, 0.3]),
            duplicate=source.choice([0.0, 0.2, 0.5]),
            delay_s=source.choice([0.0, 0.5, 5.0]),
            crash=source.choice([0.0, 0.0, 0.005, 0.03]),
        )
    else:
        world.faults = Faults()
    world.later(source.uniform(0.1, 6), lambda: misfortune(world))


def heal(world: World) -> None:
    """From here on nothing goes wrong any more; everybody is started and connected."""
    world.faults = Faults()
    for node in world.nodes():
        if not node.alive:
            node.start()
        elif not node.online:
            world.broker.connect(node)


def timed(elapsed_ms: int, task: Task, outcome: Outcome) -> Outcome:
    """What a board reports of its speed."""
    return dataclasses.replace(outcome, queries=4, elapsed_ms=elapsed_ms + task.round % 7)


@pytest.mark.parametrize("seed", range(RUNS))
def test_every_run_ends_with_the_same_weights_everywhere(seed: int) -> None:
    world = World(settings_of(seed), 4, seed=seed, has_test_set=bool(seed % 2))
    graph, data = optional_graph()
    world.server.extra, world.server.is_mute = ((data,), False) if seed % 3 == 0 else ((), seed % 3 == 1)
    for number, node in enumerate(world.devices.values()):
        node.compute_s = 1.5
        node.alter = functools.partial(timed, (100, 120, 100, 700)[number])
        node.wanted = (graph,) if number % 2 else ()
        node.fits, node.opens = (8, 3, 1, 0 if seed % 4 == 0 else 8)[number], bool(seed // 2 % 2)
    world.start()
    misfortune(world)
    world.run(lambda: not is_faulty(world))
    heal(world)
    world.finish(limit_s=2_000)
    check_end(world)
    check_order(world.server.trace)
    if seed % 3:
        assert not any(graph.sha256 in node.blobs for node in world.devices.values())


@pytest.mark.parametrize("seed", range(6))
def test_another_run_takes_over_in_the_middle(seed: int) -> None:
    """The operator starts another run in the same federation; what is still on its way belongs to the first."""
    faults = Faults(duplicate=0.3, delay_s=1.0)
    world = World(settings_of(seed), 4, seed=seed, faults=faults).start()
    world.run(lambda: world.server.coordinator.replica.index >= 3)
    world.server.crash()
    second = dataclasses.replace(settings_of(seed), seed=seed + 100)
    world.server = ServerNode(world, run_document(second, "run-2"), has_test_set=False)
    world.server.lives = 10
    world.server.start()
    world.finish(limit_s=2_000)
    check_end(world)
    assert world.server.coordinator.run.run == "run-2"
