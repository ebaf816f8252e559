"""A broker of somebody else's dies with all that it kept on its disk: the journal brings it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedzo.edge_runtime.connection.transport import Arrived
from fedzo.protocol.wire.topics import Channel, topic
from tests.broker_fixtures import Client, needs_mosquitto
from tests.end_to_end.chaos import DiskBroker
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree, wait_for

pytestmark = needs_mosquitto
BROADCAST = [topic("default", channel) for channel in (Channel.SERVER, Channel.RUN, Channel.HEAD)]


@pytest.fixture
def disk_broker(tmp_path: Path) -> Iterator[DiskBroker]:
    broker = DiskBroker(tmp_path)
    broker.start()
    yield broker
    broker.close()


def retained(url: str, topics: list[str], connect: Callable[..., Client]) -> dict[str, bytes]:
    """What a late client gets."""
    witness = connect(url, "witness", subscriptions=topics)
    found = {event.topic: event.payload for event in witness.idle(0.5) if isinstance(event, Arrived) and event.retain}
    witness.transport.close()
    return found


def test_server_and_broker_die_and_the_broker_has_lost_its_disk(
    undisturbed: Finished, fleets: MakeFleet, disk_broker: DiskBroker, connect: Callable[..., Client]
) -> None:
    """Out of the journal and the boards come retained documents, states, subscriptions and what was in flight."""
    fleet = fleets(url=disk_broker.url)
    server, boards = fleet.serve(rig="hasty"), fleet.devices(rig="hasty")
    fleet.await_entries("update", 2)
    wait_for(lambda: disk_broker.has_state, "the broker to write its state")
    boards[0].kill()  # The run waits for it, with a quorum of all, while somebody looks.
    disk_broker.kill(lose_disk=True)
    server.kill()
    disk_broker.start()
    assert not retained(disk_broker.url, BROADCAST, connect), "this broker has lost nothing"
    server = fleet.resume(rig="hasty")
    states = [topic("default", Channel.STATE, f"board-{number}") for number in (1, 2)]
    wait_for(
        lambda: set(retained(disk_broker.url, BROADCAST + states, connect)) == {*BROADCAST, *states},
        "documents and states to be back",
        logs=fleet.logs,
    )
    again = fleet.device(0)
    answer = server.answer()
    assert agree(answer, [board.answer() for board in (again, *boards[1:])]) == undisturbed.digest
    assert (answer["reports"], answer["refused"]) == (undisturbed.server["reports"], 0)
