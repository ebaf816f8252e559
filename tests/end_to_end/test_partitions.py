"""Parts of the network fall off without a word, between hosts of their own, and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.broker_fixtures import needs_mosquitto
from tests.end_to_end.chaos import DiskBroker
from tests.end_to_end.conftest import Finished
from tests.end_to_end.fleet import Fleet, Process, agree
from tests.end_to_end.namespaces import Network, lacking

pytestmark = needs_mosquitto
NAMES = [f"board-{number}" for number in range(3)]


class SpreadFleet(Fleet):
    """A fleet whose server and boards are hosts of their own."""

    network: Network

    def start(self, name: str, command: Sequence[object], **extra: str) -> Process:
        return super().start(name, [*self.network.at(name), *command], **extra)


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := lacking():
        pytest.skip(reason)
    network = Network(["server", *NAMES])
    yield network
    network.close()


@pytest.fixture
def fleet(network: Network, tmp_path: Path, artifact: Path, data: list[Path]) -> Iterator[SpreadFleet]:
    broker = DiskBroker(tmp_path, host=network.HUB, prefix=network.at("hub"))
    broker.start()
    (tmp_path / "fleet").mkdir()
    fleet = SpreadFleet(tmp_path / "fleet", artifact, data[: len(NAMES)], data[-1], url=broker.url)
    fleet.network = network
    yield fleet
    fleet.close()
    broker.close()


def test_cables_are_pulled_and_plugged(fleet: SpreadFleet, network: Network, undisturbed: Finished) -> None:
    """One board, then the server, then everybody: a round in which all must answer waits, and goes on."""
    server, boards = fleet.serve(rig="hasty"), fleet.devices(rig="hasty")
    for count, pulled in ((1, ["board-1"]), (2, ["server"]), (3, ["server", *NAMES])):
        fleet.await_entries("update", count)
        for host in pulled:
            network.pull(host)
        time.sleep(1.0)  # What was under way has arrived, or never will.
        before = len(fleet.entries("update"))
        time.sleep(1.0)
        assert len(fleet.entries("update")) == before, "this cable was not pulled"
        for host in pulled:
            network.plug(host)
    answer = server.answer()
    assert agree(answer, [board.answer() for board in boards]) == undisturbed.digest
    assert (answer["reports"], answer["refused"]) == (undisturbed.server["reports"], 0)


def test_a_board_that_is_cut_off_for_good_is_not_waited_for(fleet: SpreadFleet, network: Network) -> None:
    """The broker gives it up after its keep-alive, the round closes at its deadline; back again, it catches up."""
    server = fleet.serve("--quorum", 2, "--deadline", 4, "--rounds", 40, "--evaluate-every", 0, rig="hasty")
    boards = fleet.devices(rig="hasty")
    fleet.await_entries("update", 3)
    network.pull("board-2")
    updates = len(fleet.entries("update"))
    fleet.await_entries("update", updates + 5)
    boards[0].kill()  # The run waits for a second board.
    network.plug("board-2")
    again = fleet.device(0, rig="hasty")
    answer = server.answer()
    agree(answer, [board.answer() for board in (again, *boards[1:])])
    assert answer["phase"] == "done"
