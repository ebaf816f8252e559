"""A cluster of brokers: server and boards on different nodes, one of which dies. Runs with FEDZO_RABBITMQ=1 only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, Process, agree
from tests.end_to_end.rabbitmq import RabbitCluster, find_rabbitmq

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FEDZO_RABBITMQ"), reason="takes minutes; set FEDZO_RABBITMQ=1"),
    pytest.mark.skipif(find_rabbitmq() is None, reason="RabbitMQ is not installed: apt install rabbitmq-server"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RabbitCluster]:
    cluster = RabbitCluster(tmp_path, request.param)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def start(cluster: RabbitCluster, fleet: Fleet) -> tuple[Process, list[Process]]:
    """The server on the first node, boards on all."""
    server = fleet.serve(rig="hasty")
    boards = []
    for number in range(3):
        fleet.url = cluster.url(number % len(cluster.ports))
        boards.append(fleet.device(number, rig="hasty"))
    return server, boards


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_two_nodes_carry_a_run(cluster: RabbitCluster, undisturbed: Finished, fleets: MakeFleet) -> None:
    """A board on the other node than the server gets the documents that its node did not retain."""
    server, boards = start(cluster, fleets(url=cluster.url(0)))
    answer = server.answer(240.0)
    assert agree(answer, [board.answer(120.0) for board in boards]) == undisturbed.digest


@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_a_node_dies_and_comes_back(cluster: RabbitCluster, undisturbed: Finished, fleets: MakeFleet) -> None:
    """Its board waits for it: RabbitMQ 3.10 keeps a client's queue on one node, and refuses the client elsewhere."""
    fleet = fleets(url=cluster.url(0))
    server, boards = start(cluster, fleet)
    fleet.await_entries("update", 2)
    cluster.kill(1)
    time.sleep(3.0)
    cluster.start(1)
    answer = server.answer(240.0)
    assert agree(answer, [board.answer(120.0) for board in boards]) == undisturbed.digest
    assert (answer["reports"], answer["refused"]) == (undisturbed.server["reports"], 0)
