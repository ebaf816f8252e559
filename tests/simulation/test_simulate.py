"""Whole simulated runs: what must not change them, and what must."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.data import as_samples
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.errors import ConfigError, DataError, FedzoError, QuorumError
from fedzo.protocol.replay.update import weights_digest
from fedzo.protocol.settings import RunSettings
from fedzo.simulation.clients import StoredSamples
from fedzo.simulation.process_pool import ProcessPool
from fedzo.simulation.result import Progress, SimulationResult
from fedzo.simulation.settings import SimulationSettings
from fedzo.simulation.simulate import rounds_for_budget, simulate
from tests.simulation.conftest import images, run_settings

DATA = images(1, 240)
TEST = images(2, 100)


def run(artifact: Path, settings: RunSettings | None = None, *, pool: Any = None, **world: Any) -> SimulationResult:
    return simulate(artifact, settings or run_settings(), DATA, TEST, SimulationSettings(**world), pool=pool)


def test_a_run_ends_with_weights_an_evaluation_and_what_it_took(artifact: Path) -> None:
    seen: list[Progress] = []
    found = simulate(artifact, run_settings(), DATA, TEST, on_progress=seen.append)
    assert found.devices == found.devices_done == 6
    assert found.devices_agree
    assert weights_digest(found.weights).hex() == found.digest
    assert found.mask.n_survivors == found.weights.size < load_artifact(artifact).manifest.layout.size
    assert [row.round for row in found.curve] == [2, 4]
    assert [row.round for row in found.rounds] == [1, 2, 3, 4]
    assert all(row.test_accuracy is not None and row.device_accuracy is None for row in found.curve)
    # 7 losses of 8 samples a device and round; several in a run may fill it up
    assert 4 * 6 * 7 * 8 <= found.sample_forwards <= 4 * 6 * 8 * 8
    assert found.sample_forwards == found.rounds[-1].sample_forwards == found.curve[-1].sample_forwards
    assert (found.scalars_per_device_round, found.queries_per_device_round) == (6, 7)
    assert 4 * 6 < found.bytes_up_per_device_round < 300
    assert found.bytes_up > 4 * 6 * found.bytes_up_per_device_round
    assert 0 < found.engine_s < found.wall_s
    assert [progress.round for progress in seen] == [1, 2, 2, 3, 4, 4]
    assert found.accuracy == seen[-1].accuracy


@pytest.mark.parametrize("estimator", ["stein", "node"])
def test_the_number_of_processes_changes_no_bit(artifact: Path, estimator: str) -> None:
    settings = run_settings(training_estimator=estimator, participants=4)
    alone = run(artifact, settings, holdout=0.2)
    pool = ProcessPool(2)
    shared = run(artifact, settings, pool=pool, holdout=0.2)
    assert shared.digest == alone.digest
    assert shared.curve == alone.curve
    assert shared.rounds == alone.rounds


def test_residuals_belong_to_devices(artifact: Path) -> None:
    """Without feedback the second round of ``node`` is another one."""
    first, second = (
        run(artifact, run_settings(training_estimator="node", training_rounds=rounds, training_feedback=feedback))
        for rounds, feedback in ((1, 0.95), (1, 0.0))
    )
    assert first.digest == second.digest
    first, second = (
        run(artifact, run_settings(training_estimator="node", training_feedback=feedback)) for feedback in (0.95, 0.0)
    )
    assert first.digest != second.digest


def test_rounds_ask_some_devices_drawn_from_the_seed(artifact: Path) -> None:
    first, again, other = (run(artifact, run_settings(devices=12, participants=5, seed=seed)) for seed in (3, 3, 4))
    assert {row.participants for row in first.rounds} == {row.reports for row in first.rounds} == {5}
    assert first.digest == again.digest != other.digest
    assert first.devices_done == 12
    assert first.devices_agree


def test_lost_devices_come_back_and_end_with_the_same_weights(artifact: Path) -> None:
    quiet, first, again = (
        run(artifact, run_settings(devices=8, training_rounds=6), dropout=p, seed=5) for p in (0.0, 0.3, 0.3)
    )
    assert quiet.dropouts == 0 < first.dropouts == again.dropouts
    assert first.digest == again.digest != quiet.digest
    assert any(row.reports < row.participants for row in first.rounds)
    assert 1 <= first.devices_done <= 8
    assert first.devices_agree


def test_slow_boards_miss_the_deadline_in_virtual_time(artifact: Path) -> None:
    boards = "rpi-5-8gb:0.5,rpi-zero-2w:0.5"
    many = {"training_k": 100, "training_rounds": 3}
    patient = run(artifact, run_settings(**many), boards=boards)
    assert patient.late_reports == 0
    assert set(patient.boards) == {"rpi-5-8gb", "rpi-zero-2w"}
    times = patient.virtual_s_per_round
    assert times > 0
    hasty = run(artifact, run_settings(deadline_s=0.6 * times, **many), boards=boards)
    assert hasty.virtual_s_per_round < times
    assert min(row.reports for row in hasty.rounds) < 6
    assert hasty.digest != patient.digest
    assert hasty.devices_agree


def test_links_take_time(artifact: Path) -> None:
    quick, slow = (run(artifact, bandwidth_kbit_s=rate, latency_s=0.01) for rate in (1000.0, 10.0))
    assert 0.0 < quick.virtual_s < slow.virtual_s
    assert quick.digest == slow.digest


def test_a_board_that_is_too_small_is_not_waited_for(artifact: Path, tmp_path: Path) -> None:
    small = Path(__file__).parents[2] / "hardware_profiles" / "rpi-zero-2w.toml"
    text = small.read_text().replace("rpi-zero-2w", "tiny")
    text = re.sub(r"^ram_budget_mib = \d+", "ram_budget_mib = 20", text, count=1, flags=re.MULTILINE)
    (tmp_path / "tiny.toml").write_text(text)
    settings = run_settings(devices=6, enrol_deadline_s=5.0)
    found = run(artifact, settings, boards=f"rpi-5-8gb:0.6,{tmp_path / 'tiny.toml'}:0.4", seed=2)
    assert 0 < found.boards["tiny"] < 6
    assert found.devices_done == 6 - found.boards["tiny"]
    with pytest.raises(QuorumError, match="a device said"):
        run(artifact, settings, boards=str(tmp_path / "tiny.toml"))


def test_devices_that_join_late_replay_the_log(artifact: Path) -> None:
    settings = run_settings(devices=2, training_rounds=8, sparsity=0.0)
    found = run(artifact, settings, join_spread_s=0.06, boards="rpi-zero-2w", devices=10)
    asked = [row.participants for row in found.rounds]
    assert asked[0] < asked[-1]
    assert found.devices_done == 10
    assert found.devices_agree


@pytest.mark.parametrize(
    ("split", "check"),
    [
        ("iid", lambda parts: max(map(len, parts)) - min(map(len, parts)) <= 1),
        ("shards:1", lambda parts: max(len(set(DATA[1][part].tolist())) for part in parts) <= 2),
        ("dirichlet:0.1", lambda parts: max(map(len, parts)) > 2 * min(map(len, parts))),
    ],
)
def test_splits(artifact: Path, split: str, check: Any) -> None:
    from fedzo.simulation.clients import load_clients

    manifest = load_artifact(artifact).manifest
    clients = load_clients(DATA, manifest, SimulationSettings(split=split), 6)
    assert sorted(np.concatenate(clients.train).tolist()) == list(range(240))
    assert check(clients.train)
    assert run(artifact, run_settings(training_rounds=1), split=split).devices_agree


def test_natural_clients_are_those_of_the_file(artifact: Path, tmp_path: Path) -> None:
    clients = np.random.default_rng(7).integers(10, 16, 240)
    np.savez(tmp_path / "data.npz", x=DATA[0], y=DATA[1], client=clients)
    np.savez(tmp_path / "plain.npz", x=DATA[0], y=DATA[1])
    np.save(tmp_path / "clients.npy", clients)
    settings = run_settings(training_rounds=2)
    natural: dict[str, Any] = {"split": "natural"}
    sources: list[tuple[Any, dict[str, Any]]] = [
        ((*DATA, clients), {}),
        (tmp_path / "data.npz", {}),
        (tmp_path / "plain.npz", {"clients": str(tmp_path / "clients.npy")}),
    ]
    found = [
        simulate(artifact, settings, source, TEST, SimulationSettings(**natural, **more)).digest
        for source, more in sources
    ]
    assert len(set(found)) == 1
    assert found[0] != run(artifact, settings).digest
    for source, reason in ((tmp_path / "plain.npz", "whose samples"), (DATA, "client number")):
        with pytest.raises(DataError, match=reason):
            simulate(artifact, settings, source, TEST, SimulationSettings(**natural))
    with pytest.raises(ConfigError, match="6 clients"):
        simulate(artifact, run_settings(devices=7), (*DATA, clients), TEST, SimulationSettings(**natural))


def test_a_budget_in_sample_forwards_becomes_rounds(artifact: Path) -> None:
    settings = run_settings(participants=3)
    found = simulate(artifact, settings, DATA, TEST)
    cost = found.sample_forwards / len(found.rounds)
    assert rounds_for_budget(artifact, settings, DATA, SimulationSettings(), 10.5 * cost) == 10
    assert rounds_for_budget(artifact, settings, DATA, SimulationSettings(), 1.0) == 1


@pytest.mark.parametrize(
    ("world", "settings", "error", "reason"),
    [
        ({"devices": 3}, {}, ConfigError, "waits for 6 devices"),
        ({"split": "dirichlet"}, {}, ConfigError, "split"),
        ({"split": "iid:3"}, {}, ConfigError, "split"),
        ({"split": "shards:0"}, {}, ConfigError, "split"),
        ({"clients": "who.npy"}, {}, ConfigError, "the split iid does not look at the clients of who.npy"),
        ({"boards": "rpi-4b-4gb:-1"}, {}, ConfigError, "boards"),
        ({"boards": "nonsense"}, {}, ConfigError, "no hardware profile"),
        ({"dropout": 1.0}, {}, ConfigError, "dropout"),
        ({"holdout": float("nan")}, {}, ConfigError, "holdout"),
        ({}, {"participants": 7}, ConfigError, "participants"),
        ({}, {"participants": 2, "quorum": 3}, ConfigError, "quorum"),
    ],
)
def test_wrong_settings(
    artifact: Path, world: dict[str, Any], settings: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        run(artifact, run_settings(**settings), **world)


def test_a_killed_process_ends_the_simulation_with_its_signal(artifact: Path) -> None:
    pool = ProcessPool(2)
    killed: list[int] = []

    def kill(_: Progress) -> None:
        if not killed:
            killed.append(pool._workers[0]._process.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(FedzoError, match="signal 9"):
        simulate(artifact, run_settings(training_rounds=50), DATA, TEST, pool=pool, on_progress=kill)
    assert time.monotonic() - started < 30
    assert killed
    assert pool._workers == []


def test_a_process_that_cannot_begin_says_why(artifact: Path, tmp_path: Path) -> None:
    from fedzo.simulation.clients import load_clients
    from fedzo.simulation.work import Job

    clients = load_clients(DATA, load_artifact(artifact).manifest, SimulationSettings(), 2)
    pool = ProcessPool(1)
    try:
        with pytest.raises(FedzoError, match="not JSON"):
            pool.start(Job(str(artifact), b"nonsense", clients, None, many_queries=True))
    finally:
        pool.close()


@pytest.mark.parametrize("reads_server", [False, True])
def test_shared_weights_are_those_of_a_replica_of_its_own(artifact: Path, reads_server: bool) -> None:
    """Whoever follows, lags behind or starts over holds the same bits as a replica that is alone."""
    from fedzo.protocol.device_side.parts import Parts
    from fedzo.protocol.errors import ProtocolError
    from fedzo.protocol.perturbation.directions import round_coefficients
    from fedzo.protocol.pruning.mask import Mask
    from fedzo.protocol.wire.documents import RunDocument
    from fedzo.simulation.shared import SharedParts

    loaded = load_artifact(artifact)
    manifest = loaded.manifest
    run_document = RunDocument("run", loaded.digest.hex(), len(loaded.manifest_bytes), run_settings(sparsity=0.0))
    mask = Mask.dense(manifest.layout)
    server, alone = (Parts().replica(run_document, manifest, mask) for _ in range(2))
    parts = SharedParts((lambda: server) if reads_server else None)
    first, second, late = (parts.replica(run_document, manifest, mask) for _ in range(3))
    records = []
    for index in range(3):
        coefficients = round_coefficients(np.array([0.5 + index, -1.25]))
        records.append(server.prepare(index, index + 1, 0.125, ((2 * index, 2),), coefficients))
        alone.apply(records[-1])
        for follower in (first, second):
            follower.apply(records[-1])
            assert (follower.digest, follower.head, follower.index) == (alone.digest, alone.head, alone.index)
        assert first.weights is second.weights
        assert np.array_equal(first.weights, alone.weights)
    assert late.index == 0
    with pytest.raises(ProtocolError):
        late.apply(records[1])
    late.apply(type(records[0]).decode(records[0].encode()))
    assert late.digest == records[0].digest
    assert weights_digest(late.weights) == records[0].digest
    with pytest.raises(ProtocolError):
        late.apply(records[2])
    late.apply(records[1])
    late.apply(records[2])
    assert late.digest == alone.digest
    late.restore_from_start()
    assert late.index == 0
    assert late.digest == Parts().replica(run_document, manifest, mask).digest == weights_digest(late.weights)


def test_a_run_that_diverges_says_so(artifact: Path) -> None:
    with pytest.raises(FedzoError, match=r"diverged|a device said|over the limit"):
        run(artifact, run_settings(training_learning_rate=999.0, training_rounds=30, training_sigma=9.0))


@pytest.mark.parametrize("part", [slice(None), slice(4, None), slice(300, 700)])
def test_processes_see_the_mapped_samples_that_were_given(tmp_path: Path, part: slice) -> None:
    np.save(tmp_path / "x.npy", np.arange(4000, dtype=np.float32).reshape(1000, 1, 2, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")[part]
    samples = as_samples(mapped, np.zeros(len(mapped), np.int64), (1, 2, 2), 10)
    stored = StoredSamples.of(samples, tmp_path, "copy")
    assert not (tmp_path / "copy.npy").exists()
    rows = np.arange(len(mapped))
    np.testing.assert_array_equal(stored.open().batch(rows).x, mapped)
