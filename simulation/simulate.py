"""One call: a run with virtual devices, from enrolment to the last evaluation."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..broker_server.blobs import BlobServer
from ..broker_server.synflow import check_synflow
from ..edge_runtime.planning.memory import peak_rss_mib
from ..edge_runtime.storage.artifact import load_artifact
from ..protocol.errors import ConfigError, FedzoError, QuorumError
from ..protocol.perturbation.blocks import blocks_of
from ..protocol.perturbation.streams import Purpose, uint64s
from ..protocol.pruning.mask import Mask
from ..protocol.server_side.coordinator import Coordinator
from ..protocol.server_side.coordinator_events import Connected
from ..protocol.server_side.rate_finder import RangeTest, range_test_settings, with_found_rate
from ..protocol.settings import RunSettings
from ..protocol.wire.documents import RunDocument
from .boards import choose_boards
from .clients import Clients, Source, load_clients, load_test_set
from .clock import Clock
from .labour import Labour
from .pools import InlinePool, WorkPool
from .result import Progress, SimulationResult
from .settings import SimulationSettings
from .shared import SharedParts
from .virtual_device import VirtualDevice, World
from .virtual_server import VirtualServer
from .wires import Wires
from .work import Job, Usage

__all__ = ["rounds_for_budget", "simulate"]

_RUN = "simulation"
_LONGER = 1.01  # a lost device comes back a little after the deadline, so that the round is over


def simulate(
    artifact_folder: str | Path,
    run_settings: RunSettings,
    data: Source,
    test_data: Source | None = None,
    settings: SimulationSettings | None = None,
    *,
    pool: WorkPool | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SimulationResult:
    """Run a federation of virtual devices.

    The machines of server and devices, the messages, the graphs and the estimators are those of a real run: with the
    same data, names in the same order and the same graphs it ends with the same bits.

    Args:
        artifact_folder: What ``fedzo export`` wrote.
        run_settings: Of the run; its deadlines count in virtual time. With ``tune_rounds`` a range test comes first.
        data: Of the devices: a file or folder, ``(x, y)`` or ``(x, y, client)``.
        test_data: The server's own test set; the test part of ``data`` by default, if there is one.
        settings: The virtual world; :class:`SimulationSettings` by default.
        pool: Who computes; :class:`InlinePool` by default. It is started and closed here.
        on_progress: Called after every update and evaluation.

    Raises:
        ConfigError: The settings do not fit together.
        DataError: The data cannot be used.
        QuorumError: Too few devices could answer.
        FedzoError: Training diverged, or a process of the pool is gone.
    """
    world, tuning = settings or SimulationSettings(), 0.0
    if run_settings.tune_rounds:
        first = _Simulation(artifact_folder, range_test_settings(run_settings), data, test_data, world)
        tried = _run(first, pool, None)
        tuning = tried.sample_forwards + tried.scoring_sample_forwards
        assert first.range_test is not None
        run_settings = with_found_rate(run_settings, first.range_test)
    found = _run(_Simulation(artifact_folder, run_settings, data, test_data, world), pool, on_progress)
    return dataclasses.replace(found, tuning_sample_forwards=tuning)


def _run(
    simulation: _Simulation, pool: WorkPool | None, on_progress: Callable[[Progress], None] | None
) -> SimulationResult:
    workers = pool or InlinePool()
    try:
        return simulation.run(workers, on_progress)
    finally:
        workers.close()


def rounds_for_budget(
    artifact_folder: str | Path,
    run_settings: RunSettings,
    data: Source,
    settings: SimulationSettings,
    budget_sf: float,
    *,
    probe_rounds: int = 2,
) -> int:
    """Rounds whose training costs at most ``budget_sf`` sample-forwards, at least 1.

    What a round costs is measured: a few rounds are run, without an evaluation.

    Args:
        artifact_folder: See :func:`simulate`.
        run_settings: See :func:`simulate`; the number of rounds does not matter.
        data: See :func:`simulate`.
        settings: See :func:`simulate`.
        budget_sf: Samples sent once through the whole network.
        probe_rounds: Rounds to run.
    """
    training = dataclasses.replace(run_settings.training, rounds=probe_rounds)
    short = dataclasses.replace(run_settings, training=training, evaluate_every=0)
    found = simulate(artifact_folder, short, data, None, settings)
    return max(1, int(budget_sf * probe_rounds / found.sample_forwards))


class _Simulation:
    """Everything that one simulation is made of.

    Attributes:
        range_test: What a range test has found; None if it is none, or has not run yet.
    """

    def __init__(
        self,
        artifact_folder: str | Path,
        run_settings: RunSettings,
        data: Source,
        test_data: Source | None,
        settings: SimulationSettings,
    ) -> None:
        self._started = time.perf_counter()
        self.range_test: RangeTest | None = None
        self._settings, self._folder = settings, Path(artifact_folder)
        self._artifact = load_artifact(self._folder)
        manifest = self._artifact.manifest
        if run_settings.sparsity > 0 and manifest.layout.maskable_size == 0:
            raise ConfigError(
                f"the sparsity is {run_settings.sparsity}, but the artifact was exported without pruning",
                hint="fedzo export ... --sparsity 0.8, or a sparsity of 0 here",
            )
        blocks_of(run_settings.training, manifest, Mask.dense(manifest.layout))  # raises if the artifact lacks a graph
        check_synflow(self._artifact, run_settings)
        self._clients: Clients = load_clients(data, manifest, settings, settings.devices or run_settings.devices)
        self._test = load_test_set(test_data, data, manifest, settings)
        n_devices = len(self._clients)
        if run_settings.devices > n_devices:
            raise ConfigError(
                f"the run waits for {run_settings.devices} devices, there are {n_devices} virtual ones",
                hint="wait for fewer, or simulate more",
            )
        self._run = RunDocument(_RUN, self._artifact.digest.hex(), len(self._artifact.manifest_bytes), run_settings)
        self._boards, self._board_of = choose_boards(
            manifest, run_settings, settings, self._clients.dataset(0), n_devices
        )
        self._marks: dict[str, tuple[float, float, Usage]] = {}

    def run(self, pool: WorkPool, on_progress: Callable[[Progress], None] | None) -> SimulationResult:
        """Start the pool, and let everything happen."""
        settings, run, artifact = self._settings, self._run, self._artifact
        pool.start(Job(str(self._folder), run.encode(), self._clients, self._test, settings.many_queries))
        clock = Clock()
        wires, labour = Wires(clock), Labour(pool, clock)

        def mark(phase: str) -> None:
            if phase not in self._marks:
                labour.settle()
                self._marks[phase] = (time.perf_counter(), time.process_time(), pool.usage())

        coordinator = Coordinator(run, artifact.manifest, birth=1, has_test_set=self._test is not None)
        blobs = BlobServer(artifact, self._folder)
        n_test = len(self._test) if self._test is not None else 0
        server = VirtualServer(coordinator, artifact, blobs, wires, clock, labour, n_test, mark, on_progress)
        wires.server = server
        files = {graph.sha256: b"" for graph in artifact.manifest.graphs}
        files[artifact.digest] = artifact.manifest_bytes
        away_s = _LONGER * run.settings.deadline_s
        world = World(clock, wires, labour, SharedParts(lambda: coordinator.replica), settings, files, away_s)
        spread = uint64s(settings.seed, Purpose.CHANCE, 0, 1, len(self._clients)).astype(float) * 2.0**-64
        for number, (board, at) in enumerate(zip(self._board_of, spread.tolist(), strict=True)):
            samples, held = len(self._clients.train[number]), len(self._clients.test[number])
            device = VirtualDevice(world, number, self._boards[board], samples, held)
            wires.attach(device)
            clock.at(at * settings.join_spread_s, device.connect)
        clock.at(0.0, server.on, Connected())
        while not server.finished:
            horizon, due = labour.horizon, clock.next
            if horizon is not None and (due is None or due > horizon):
                labour.settle()
            elif due is None:
                raise FedzoError("the simulation stands still: nobody has anything to do")
            else:
                clock.step()
        if server.error is not None:
            raise self._explained(server, labour, wires.devices)
        mark("done")
        self.range_test = coordinator.range_test
        return self._result(server, world, pool)

    def _explained(self, server: VirtualServer, labour: Labour, devices: list[VirtualDevice]) -> FedzoError:
        """The error, with what the first device said that could not go on: nobody can look into its log."""
        error = server.error
        assert error is not None
        detail = labour.detail or next((device.error.message for device in devices if device.error is not None), "")
        said = f"a device said: {detail}" if detail else f"a report was refused: {server.refusal}"
        if isinstance(error, QuorumError):
            message = f"{error.message}; {said}" if detail or server.refusal else error.message
            return QuorumError(message, hint="a smaller quorum, a longer deadline, or fewer dropouts")
        return error

    def _result(self, server: VirtualServer, world: World, pool: WorkPool) -> SimulationResult:
        coordinator, devices = server.coordinator, world.wires.devices
        replica = coordinator.replica
        weights, _ = replica.evaluated()
        start, trained = self._marks.get("train"), self._marks.get("trained")
        end, usage = time.perf_counter(), pool.usage()
        first = min(mark[0] for mark in self._marks.values())
        training_s, cpu_s, spent = 0.0, 0.0, Usage()
        if start is not None and trained is not None:
            training_s, spent = trained[0] - start[0], trained[2] - start[2]
            cpu_s = trained[1] - start[1] + spent.cpu_s
        share = 1.0 / cpu_s if cpu_s else 0.0
        final = [device.machine.replica for device in devices if device.machine.stage == "done"]
        rounds = server.rounds
        passed = rounds[-1].virtual_s - rounds[0].virtual_s if len(rounds) > 1 else 0.0
        per_round = passed / (len(rounds) - 1) if len(rounds) > 1 else (rounds[0].virtual_s if rounds else 0.0)
        names = Counter(self._boards[board].profile for board in self._board_of)
        return SimulationResult(
            curve=server.curve,
            rounds=rounds,
            weights=weights,
            mask=coordinator.mask,
            digest=replica.digest.hex(),
            learning_rate=coordinator.run.training.learning_rate,
            devices=len(devices),
            devices_agree=bool(final) and all(one is not None and one.digest == replica.digest for one in final),
            devices_done=len(final),
            sample_forwards=world.labour.sample_forwards,
            scoring_sample_forwards=world.labour.scoring_forwards,
            tuning_sample_forwards=0.0,
            scalars_per_device_round=server.scalars / max(1, server.reports),
            queries_per_device_round=server.queries / max(1, server.reports),
            bytes_up_per_device_round=world.wires.training_up / max(1, server.asked),
            bytes_down_per_device_round=world.wires.training_down / max(1, server.connected),
            bytes_up=sum(device.up.bytes for device in devices),
            bytes_down=sum(device.down.bytes for device in devices),
            late_reports=server.late,
            dropouts=world.dropouts,
            declined=server.declined,
            decline_detail=world.labour.detail if server.declined else "",
            wall_s=end - first,
            training_wall_s=training_s,
            start_wall_s=first - self._started,
            engine_s=usage.engine_s,
            engine_cpu_s=usage.engine_cpu_s,
            engine_share=spent.engine_s / (pool.processes * training_s) if training_s else 0.0,
            engine_cpu_share=share * spent.engine_cpu_s,
            forward_cpu_share=share * spent.forward_cpu_s,
            work_cpu_share=share * spent.work_cpu_s,
            training_cpu_s=cpu_s,
            processes=pool.processes,
            virtual_s=world.clock.now,
            virtual_s_per_round=per_round,
            peak_rss_mib=peak_rss_mib() + usage.peak_rss_mib,
            boards=dict(names),
        )
