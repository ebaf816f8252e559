"""A cluster of brokers: server and boards on different nodes, one of which dies. Runs with FEDZO_RABBITMQ=1 only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker_fixtures import Proxy
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree
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


@pytest.mark.parametrize("cluster", [2, 3], indirect=True, ids=["two-nodes", "three-nodes"])
def test_a_node_dies(cluster: RabbitCluster, undisturbed: Finished, fleets: MakeFleet) -> None:
    """Its board waits for it: RabbitMQ 3.10 keeps a client's queue on one node, and refuses the client elsewhere."""
    nodes = len(cluster.ports)
    links = [Proxy(("127.0.0.1", cluster.ports[number % nodes])) for number in range(3)]
    fleet = fleets(url=cluster.url(0))
    try:
        server = fleet.serve(rig="hasty")
        boards = []
        for number, link in enumerate(links):
            fleet.url = link.url
            boards.append(fleet.device(number, rig="hasty"))
        fleet.await_entries("update", 2)
        cluster.kill(1)
        time.sleep(3.0)
        cluster.start(1)
        answer = server.answer(240.0)
        assert agree(answer, [board.answer(120.0) for board in boards]) == undisturbed.digest
        assert (answer["reports"], answer["refused"]) == (undisturbed.server["reports"], 0)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{fleet.logs()}\n{cluster.logs()}") from error
    finally:
        for link in links:
            link.close()
