"""What must hold of every schedule, whatever happened in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.server_side.coordinator import Coordinator
from tests.protocol.exactly_once.artifact import artifact_of
from tests.protocol.exactly_once.ledger import Ledger

if TYPE_CHECKING:
    from tests.protocol.exactly_once.nodes import ServerNode
    from tests.protocol.exactly_once.world import World

__all__ = ["check_end", "check_state"]


def _replayed(server: ServerNode, *, from_snapshot: bool) -> Coordinator:
    """What a fresh coordinator makes of the journal alone."""
    coordinator = Coordinator(server.run, artifact_of(server.run.training.estimator)[0], birth=0)
    coordinator.restore(server.entries_to_resume() if from_snapshot else server.entries())
    return coordinator


def check_state(world: World) -> None:
    """What must hold at any time: the weights of a device are those that the server had at that place of the log."""
    for node in world.devices:
        replica = node.machine.replica
        if replica is not None and replica.index:
            assert replica.digest == world.server.updates[replica.index - 1].digest, f"{node.name} has other weights"


def check_end(world: World) -> Ledger:
    """What must hold at the end of a run that was completed. Gives what its journal says."""
    server = world.server
    assert server.error is None, f"the run ended with {server.error}"
    final = server.machine.replica
    assert final.index == server.run.training.rounds
    ledger = Ledger(server.run, server.machine.manifest)
    for entry in server.entries():
        ledger.read(entry)
    for from_snapshot in (False, True) if server.journal.sequences("snapshot") else (False,):
        again = _replayed(server, from_snapshot=from_snapshot)
        assert (again.replica.digest, again.replica.head) == (final.digest, final.head), "a replay has other weights"
        assert again.mask == server.machine.mask
        assert again.finished
    for node in world.devices:
        if node.name not in server.finalists or (node.board.fits == 0 and isinstance(node.error, MemoryBudgetError)):
            continue
        assert node.error is None, f"{node.name} left with {node.error}"
        replica = node.machine.replica
        assert replica is not None
        assert replica.digest == final.digest, f"{node.name} has other weights"
        assert replica.evaluated()[1] == final.evaluated()[1], f"{node.name} has another average"
    _check_receipts(world, ledger)
    return ledger


def _check_receipts(world: World, ledger: Ledger) -> None:
    """Whoever was told that its report was accepted finds it in the journal, with the scalars that it sent."""
    server = world.server
    for node in world.devices:
        for round_ in node.accepted:
            assert (round_, node.name) in server.reports, f"the report of {node.name} on round {round_} is lost"
    for (round_, name), payload in server.reports.items():
        sent = world.node(name).sent
        assert any(payload == report.encode() for (_, one), report in sent.items() if one == round_)
    assert ledger.counted.keys() <= server.reports.keys()
