"""The artifact, the data and the undisturbed run that the other runs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from tests.end_to_end.fleet import Fleet, agree
from tests.end_to_end.materials import make_artifact, make_data

DEVICES = 3
MakeFleet = Callable[..., Fleet]


@dataclass(frozen=True)
class Finished:
    """A run that is over."""

    fleet: Fleet
    server: dict[str, Any]
    devices: Sequence[dict[str, Any]]
    digest: str


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of four devices, and the server's as the last."""
    return make_data(tmp_path_factory.mktemp("data"), 5)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 for 16x16 images, pruned to a tenth."""
    return make_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="session")
def artifact_with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with a loss of its own for every stage."""
    return make_artifact(tmp_path_factory.mktemp("artifact"), "lenet-with-heads", local_heads=True)


@pytest.fixture(scope="session")
def make_fleet(
    tmp_path_factory: pytest.TempPathFactory, artifact: Path, artifact_with_heads: Path, data: list[Path]
) -> MakeFleet:
    """Makes a fleet of a few devices; whoever makes it closes it."""

    def make(devices: int = DEVICES, *, local_heads: bool = False, **settings: Any) -> Fleet:
        folder = artifact_with_heads if local_heads else artifact
        return Fleet(tmp_path_factory.mktemp("fleet"), folder, data[:devices], data[-1], **settings)

    return make


@pytest.fixture
def fleets(make_fleet: MakeFleet) -> Iterator[MakeFleet]:
    """Makes fleets that are closed when the test ends."""
    made: list[Fleet] = []

    def make(*arguments: Any, **settings: Any) -> Fleet:
        made.append(make_fleet(*arguments, **settings))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def _mosquitto_url() -> Iterator[str]:
    """A mosquitto that outlives every server."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    broker = MosquittoBroker(port=0)
    broker.start()
    yield broker.url
    broker.stop()


mosquitto_url = pytest.fixture(_mosquitto_url, name="mosquitto_url")
module_mosquitto_url = pytest.fixture(_mosquitto_url, name="module_mosquitto_url", scope="module")


@pytest.fixture(scope="session")
def undisturbed(make_fleet: MakeFleet) -> Iterator[Finished]:
    """A run in which nothing happens, over the broker that the server chooses."""
    fleet = make_fleet(broker="auto")
    try:
        server, devices = fleet.serve(), fleet.devices()
        answer, answers = server.answer(), [device.answer() for device in devices]
        yield Finished(fleet, answer, answers, agree(answer, answers))
    finally:
        fleet.close()
