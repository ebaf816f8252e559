"""The server, its broker or both are killed at the worst moments; resumed, the run ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import socket

import pytest

from fedzo.broker_server.brokers.mosquitto import find_mosquitto
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, Process, agree, wait_for

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

# In the order in which a run passes them; the counts start again with every process.
POINTS = (
    "after:run:1",
    "after:enrolment:1",
    "before:announce:1",
    "after:announce:1",
    "after:report:1",
    "before:mask:1",
    "after:mask:1",
    "after:report:2",
    "before:update:1",
    "after:update:1",
    "sent:log:1",
    "before:evaluation:1",
    "after:evaluation:1",
    "sent:ack:2",
    "sent:head:3",
    "before:phase:1",
)


def finish(fleet: Fleet, server: Process, expected: Finished) -> None:
    """The run ends with the weights of the undisturbed one; nothing was lost and nothing counted twice."""
    answer = server.answer()
    assert agree(answer, [device.answer() for device in fleet.boards]) == expected.digest
    assert (answer["reports"], answer["refused"]) == (expected.server["reports"], 0)
    replayed = fleet.fedzo("replay", fleet.path, "--recount")
    assert replayed["weights_digest"] == expected.digest
    assert replayed["recounted"] == answer["rounds"] + 1  # and the mask


@pytest.mark.slow
def test_the_server_is_killed_at_every_kind_of_point(
    undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str
) -> None:
    """The broker and the devices go on; the server's next process dies a little later in the run."""
    fleet = fleets(url=mosquitto_url)
    fleet.devices()
    server = fleet.serve(rig=POINTS[0])
    for point, following in zip(POINTS, (*POINTS[1:], ""), strict=True):
        assert server.wait() == -signal.SIGKILL, (point, server.stdout, server.stderr)
        server = fleet.resume(rig=following)
    finish(fleet, server, undisturbed)


def test_a_finished_run_is_over_at_once(undisturbed: Finished) -> None:
    fleet = undisturbed.fleet
    before = len(fleet.entries())
    answer = fleet.resume().answer()
    assert (answer["phase"], answer["weights_digest"]) == ("done", undisturbed.digest)
    # What the devices said at their end is in the journal as well.
    assert answer["digests_agree"] is True
    assert answer["accuracy"] == undisturbed.server["accuracy"]
    assert len(fleet.entries()) == before


@pytest.mark.parametrize(
    ("broker", "program"), [pytest.param("mosquitto", "mosquitto", marks=needs_mosquitto), ("embedded", "python")]
)
def test_a_managed_broker_that_is_killed_comes_back(
    broker: str, program: str, undisturbed: Finished, fleets: MakeFleet
) -> None:
    fleet = fleets(broker=broker)
    fleet.devices(rig="hasty")
    server = fleet.serve(rig="hasty")
    fleet.await_entries("update", 2)
    os.kill(server.child(program), signal.SIGKILL)
    finish(fleet, server, undisturbed)
    assert any("connected again" in device.stderr for device in fleet.boards)


@pytest.mark.parametrize("broker", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_the_server_is_killed_and_its_broker_with_it(broker: str, undisturbed: Finished, fleets: MakeFleet) -> None:
    """No broker outlives its server, and the next one finds the port free."""
    fleet = fleets(broker=broker)
    fleet.devices(rig="hasty")
    server = fleet.serve(rig="after:update:2")
    assert server.wait() == -signal.SIGKILL
    wait_for(lambda: not listens(fleet.url), "the broker to end with its server", 10.0)
    assert all(device.running for device in fleet.boards)
    finish(fleet, fleet.resume(), undisturbed)


@needs_mosquitto
def test_a_broker_that_cannot_be_started_again_ends_the_server_not_the_run(
    undisturbed: Finished, fleets: MakeFleet
) -> None:
    fleet = fleets()
    fleet.devices(rig="hasty")
    server = fleet.serve(rig="last-broker")
    fleet.await_entries("update", 1)
    os.kill(server.child("mosquitto"), signal.SIGKILL)
    assert server.wait() == 5, server.stderr
    assert server.error["kind"] == "BrokerError"
    assert "mosquitto ended with signal SIGKILL" in server.error["message"]
    assert str(fleet.path) in server.error["hint"]
    finish(fleet, fleet.resume(), undisturbed)


@needs_mosquitto
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_asked_to_stop_can_be_resumed(
    undisturbed: Finished, fleets: MakeFleet, number: signal.Signals, code: int
) -> None:
    fleet = fleets()
    fleet.devices(rig="hasty")
    server = fleet.serve()
    fleet.await_entries("update", 2)
    server.signal(number)
    assert server.wait() == code, server.stderr
    assert len(server.stdout.splitlines()) == 1
    assert f"fedzo serve --resume {fleet.path}" in server.stderr
    assert not listens(fleet.url)
    assert len(fleet.entries("update")) < undisturbed.server["rounds"]
    assert all(device.running for device in fleet.boards)
    finish(fleet, fleet.resume(), undisturbed)


@needs_mosquitto
def test_a_resumed_server_comes_back_to_its_port(undisturbed: Finished, fleets: MakeFleet) -> None:
    """Also to one that it chose itself."""
    fleet = fleets()
    server = fleet.serve("--port", 0, rig="after:enrolment:3")
    server.until("devices join with")
    found = re.search(r"join (mqtt://\S+)", server.stderr)
    assert found is not None
    assert fleet.url != found[1]
    fleet.url = found[1]
    fleet.devices(rig="hasty")
    assert server.wait() == -signal.SIGKILL
    finish(fleet, fleet.resume(), undisturbed)


def test_one_server_a_run(undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str) -> None:
    """A second one is refused, and the first one does not notice."""
    fleet = fleets(url=mosquitto_url)
    server = fleet.serve()
    server.until("devices join with")
    second = fleet.resume()
    assert second.wait() == 3, second.stderr
    assert second.error["kind"] == "ConfigError"
    assert f"in use by process {server.pid}" in second.error["message"]
    fleet.devices()
    finish(fleet, server, undisturbed)


def listens(url: str) -> bool:
    host, _, port = url.removeprefix("mqtt://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False
