"""The average of the weights: what it is, that every side has the same bits, and where it goes."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.blocks import Block
from fedzo.protocol.replay.moving_average import MovingAverage
from fedzo.protocol.replay.optimisers import OPTIMISERS, OptimiserConfig, OptimiserName
from fedzo.protocol.replay.update import Replica, weights_digest
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import UpdateRecord
from tests.protocol.builders import seeded_coefficients, seeded_normals, small_layout
from tests.protocol.replay.test_update import RATE, small_mask, whole

DECAY = 0.875


def make(optimiser: OptimiserName = "adam", ema: float = DECAY, **constants: float) -> Replica:
    return Replica(small_layout(), small_mask(), 11, 12, whole(), OptimiserConfig(optimiser, ema=ema, **constants))


def step(replica: Replica) -> UpdateRecord:
    index = replica.index
    return replica.prepare(index, index, RATE, ((3 * index, 3),), seeded_coefficients(5, index, 3))


def test_the_mean_of_the_weights_after_each_update() -> None:
    average, rows = MovingAverage(DECAY, 40), [seeded_normals(1, i, 40) for i in range(30)]
    for count, row in enumerate(rows, start=1):
        average.add(row)
        factors = DECAY ** np.arange(count - 1, -1, -1)
        expected = (factors[:, None] * np.array(rows[:count], dtype=np.float64)).sum(axis=0) / factors.sum()
        np.testing.assert_allclose(average.values(), expected, rtol=0, atol=1e-6)


def test_after_one_update_it_is_the_weights() -> None:
    replica = make()
    start = replica.weights.copy()
    assert replica.evaluated()[0].tobytes() == start.tobytes()  # there is nothing to average yet
    step(replica)
    np.testing.assert_allclose(replica.evaluated()[0], replica.weights, rtol=1e-6)
    assert not np.array_equal(replica.weights, start)


def test_without_an_average_the_weights_are_evaluated() -> None:
    replica = make(ema=0.0)
    step(replica)
    values, digest = replica.evaluated()
    assert values.tobytes() == replica.weights.tobytes()
    assert digest == replica.digest
    values[0] = 7.0
    assert replica.weights[0] != 7.0


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_devices_server_and_snapshots_have_the_same_bits(optimiser: OptimiserName) -> None:
    server, device, late = make(optimiser), make(optimiser), make(optimiser)
    for _ in range(9):
        message = decode(step(server).encode())
        assert isinstance(message, UpdateRecord)
        device.apply(message)
        if server.index == 5:
            late.restore(server.snapshot())
        elif server.index > 5:
            late.apply(message)
    values, digest = server.evaluated()
    for other in (device, late):
        assert other.evaluated()[0].tobytes() == values.tobytes()
        assert other.evaluated()[1] == digest == weights_digest(values)
        assert other.snapshot() == server.snapshot()
    assert digest != server.digest
    server.restore_from_start()
    assert server.evaluated()[0].tobytes() == initial_weights(small_layout(), 11)[small_mask().survivors()].tobytes()
    for _ in range(9):
        step(server)
    assert server.evaluated()[1] == digest


def test_a_refused_update_leaves_it_alone() -> None:
    replica = make()
    for _ in range(3):
        step(replica)
    before = replica.evaluated()[1]
    with pytest.raises(ProtocolError, match="not finite"):
        replica.prepare(3, 3, float(np.float32(3e38)), ((0, 1),), np.array([2.0**80], dtype=np.float32))
    assert replica.evaluated()[1] == before


@pytest.mark.parametrize("change", [{"ema": 0.0}, {"ema": 0.5}, {"front_rate": 0.5}])
def test_sides_with_another_average_or_front_do_not_follow_each_other(change: dict[str, float]) -> None:
    server, device = make(), Replica(
        small_layout(), small_mask(), 11, 12, whole(), OptimiserConfig("adam", **{"ema": DECAY, **change})
    )  # fmt: skip
    record = step(server)
    with pytest.raises(ProtocolError, match="continues the log"):
        device.apply(record)
    with pytest.raises(ProtocolError, match="snapshot"):
        device.restore(server.snapshot())


def test_the_front_block_has_a_rate_of_its_own() -> None:
    n = small_mask().n_survivors
    blocks = (Block(0, 0, 20, "probe", "rademacher", 3), Block(1, 20, n - 20, "probe", "hadamard", 4))
    start = initial_weights(small_layout(), 11)[small_mask().survivors()]
    moved = {}
    for front_rate in (0.0, 0.25, 1.0):
        config = OptimiserConfig("sgd", front_rate=front_rate, weight_decay=0.5)
        replica = Replica(small_layout(), small_mask(), 11, 12, blocks, config)
        segments = ((2, 2), (blocks[1].offset + 5, 3))
        replica.prepare(0, 0, 0.125, segments, seeded_coefficients(5, 0, 5))
        moved[front_rate] = replica.weights - start
    assert not moved[0.0][:20].any()
    np.testing.assert_allclose(moved[0.25][:20], 0.25 * moved[1.0][:20], rtol=0, atol=1e-7)
    for other in (0.0, 0.25):
        assert moved[other][20:].tobytes() == moved[1.0][20:].tobytes()
    assert moved[1.0].any()


def test_one_block_has_no_front() -> None:
    one, other = make("sgd", front_rate=1.0), make("sgd", front_rate=0.25)
    step(one)
    step(other)
    assert one.digest == other.digest
