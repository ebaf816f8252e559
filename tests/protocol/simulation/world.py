"""A whole federation in one thread and in virtual time: real state machines and codecs, fake engines and network.

Everything is a function of the seed. Messages travel as topic and bytes through a broker that keeps what is retained;
``Faults`` says what happens to them on the way. Nodes crash between any two commands and come back with what would be
on their disk: a device with its outbox, its blobs and a higher session, the server with its journal.
"""

from __future__ import annotations

from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, parse
from fedzo.protocol.wire.messages import Report, UpdateRecord
from tests.protocol.simulation.fakes import manifest_for, run_document
from tests.protocol.simulation.network import Faults, Node, Simulation
from tests.protocol.simulation.nodes import DeviceNode, Entry, ServerNode


class World(Simulation):
    """One server and some devices.

    Args:
        settings: Of the run.
        devices: How many devices there are.
        seed: Of everything that happens by chance.
        faults: Of the network.
        has_test_set: Whether the server evaluates.
    """

    def __init__(
        self,
        settings: RunSettings,
        devices: int,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        has_test_set: bool = False,
    ) -> None:
        super().__init__(seed, faults or Faults())
        self.server = ServerNode(self, run_document(settings), has_test_set=has_test_set)
        self.devices = {name: DeviceNode(self, name) for name in (f"dev-{i}" for i in range(devices))}

    def nodes(self) -> list[Node]:
        """The server and the devices."""
        return [self.server, *self.devices.values()]

    def start(self) -> World:
        """Start everybody, the devices one after another."""
        self.server.start()
        for i, node in enumerate(self.devices.values()):
            self.later(0.01 * i, node.start)
        return self

    def finish(self, *, limit_s: float = 10_000.0) -> World:
        """Run to the end of the run and of every living device."""
        self.run(self.is_over, limit_s=limit_s)
        return self

    def is_over(self) -> bool:
        """Whether the server and every living device have left."""
        return self.server.alive and self.server.left and all(node.left for node in self.devices.values() if node.alive)

    def describe(self) -> str:
        """Where everybody is, for a failed test."""
        head = self.server.coordinator.head
        states = {n.name: n.machine.stage for n in self.devices.values() if n.machine}
        return f"{head.phase} round {head.round}, log {head.log_length}, {states}"


def check_journal(journal: list[Entry], settings: RunSettings) -> None:
    """What must hold for any journal, however the run went."""
    reports: dict[int, dict[str, Report]] = {}
    late: dict[tuple[int, str], Report] = {}
    updated: list[int] = []
    announced: list[Announcement] = []
    for kind, round_, device, payload in journal:
        if kind == "announce":
            announced.append(parse(Announcement, payload))
            assert announced[-1].round == round_
        elif kind == "report":
            report = decode(payload)
            assert isinstance(report, Report)
            assert report.round == round_
            assert device not in reports.setdefault(round_, {}), f"two reports of {device} in round {round_}"
            reports[round_][device] = report
            if round_ != announced[-1].round:
                assert round_ in updated[-settings.staleness :], f"a report of round {round_} is too late"
                late[round_, device] = report
        elif kind in ("mask", "update"):
            usable = {device for device, report in reports.get(round_, {}).items() if report.blocks}
            assert round_ == announced[-1].round
            if kind == "update":
                usable |= {device for _, device in late}
                check_parts(payload, settings, updated, late)
                late = {}
                updated.append(round_)
            assert len(usable) >= settings.quorum, f"round {round_} was closed under the quorum"
    rounds = [head.round for head in announced]
    assert rounds == sorted(set(rounds)), "round numbers do not grow"
    updates = [decode(payload) for kind, _, _, payload in journal if kind == "update"]
    assert [u.index for u in updates if isinstance(u, UpdateRecord)] == list(range(len(updates)))


def check_parts(payload: bytes, settings: RunSettings, updated: list[int], late: dict[tuple[int, str], Report]) -> None:
    """An update has scalars of exactly those earlier rounds of which reports were waiting."""
    record = decode(payload)
    assert isinstance(record, UpdateRecord)
    ages = {len(updated) - updated.index(round_) for round_, _ in late}
    assert set(record.ages) - {0} == ages
    assert all(age <= settings.staleness for age in ages)


def replay(server: ServerNode) -> Coordinator:
    """What a fresh coordinator makes of the journal."""
    coordinator = Coordinator(server.run, manifest_for(server.run.training.estimator), birth=99)
    coordinator.restore(server.journal)
    return coordinator


def check_end(world: World) -> None:
    """What must hold at the end of a run that was completed."""
    server, settings = world.server, world.server.run.settings
    assert server.error is None
    check_journal(server.journal, settings)
    final = server.coordinator.replica
    assert final.index == settings.training.rounds
    again = replay(server)
    assert again.replica.digest == final.digest
    assert again.replica.head == final.head
    assert again.mask == server.coordinator.mask
    for node in world.devices.values():
        if node.alive and node.fits == 0 and node.error is not None:
            assert isinstance(node.error, MemoryBudgetError)
        elif node.alive:
            assert node.error is None, f"{node.name} left with {node.error}"
            assert node.machine is not None
            assert node.machine.replica is not None
            assert node.machine.replica.digest == final.digest, f"{node.name} has other weights"
            assert node.machine.replica.evaluated()[1] == final.evaluated()[1], f"{node.name} has another average"
