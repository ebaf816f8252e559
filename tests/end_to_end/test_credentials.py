"""Whole runs over TLS with the credentials of `fedzo credentials`, and runs that are signed by somebody else."""

from __future__ import annotations

import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedzo.broker_server.security.signing import RunSigner
from fedzo.edge_runtime.connection.transport import MqttTransport
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Announcement, RunDocument
from fedzo.protocol.wire.topics import Channel, topic
from tests.broker_fixtures import needs_mosquitto
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, Process, agree, wait_for


class SecuredFleet:
    """A fleet whose server and boards use a credentials folder."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.folder = fleet, fleet.folder / "credentials"
        made = fleet.fedzo("credentials", "init", "--folder", self.folder, "--host", "localhost")
        names = [f"board-{number}" for number in range(len(fleet.data))]
        self.issued = fleet.fedzo("credentials", "issue", *names, "--folder", self.folder)
        self.run_key = made["run_key"]
        fleet.url = fleet.url.replace("mqtt://127.0.0.1", "mqtts://localhost")

    def serve(self, *options: object) -> Process:
        return self.fleet.serve("--credentials", self.folder, *options)

    def device(self, number: int, *options: object) -> Process:
        return self.fleet.device(number, "--credentials", self.folder / "devices" / f"board-{number}", *options)


@pytest.mark.parametrize(
    "broker", [pytest.param("mosquitto", marks=needs_mosquitto), pytest.param("embedded", marks=pytest.mark.slow)]
)
def test_a_whole_run_over_tls(fleets: MakeFleet, undisturbed: Finished, broker: str) -> None:
    secured = SecuredFleet(fleets(broker=broker))
    fleet = secured.fleet
    server = secured.serve()
    devices = [secured.device(number) for number in range(len(fleet.data))]
    answers = [device.answer() for device in devices]
    assert agree(server.answer(), answers) == undisturbed.digest, "security changes no bit of the weights"
    port = fleet.url.rpartition(":")[2]
    assert f"devices join with: fedzo-device join mqtts://localhost:{port} --credentials DEVICE" in server.stderr
    assert secured.issued["commands"]["board-0"].endswith("--credentials board-0 --data DATA")
    assert f"run key: {secured.run_key}" in server.stderr
    assert "may do everything" not in server.stderr
    for number in range(len(fleet.data)):
        pin = fleet.folder / f"state-board-{number}" / "run-key"
        assert pin.read_text().strip() == secured.run_key


@needs_mosquitto
def test_a_board_is_revoked_while_the_run_goes_on(fleets: MakeFleet) -> None:
    secured = SecuredFleet(fleets())
    fleet = secured.fleet
    n = len(fleet.data)
    server = secured.serve("--rounds", 10_000, "--quorum", n - 1, "--evaluate-every", 0)
    boards = [secured.device(number) for number in range(n)]
    fleet.await_entries("update", 2)
    pid = server.child("mosquitto")
    fleet.fedzo("credentials", "revoke", "board-0", "--folder", secured.folder)
    boards[0].until("the link was lost")
    updates = len(fleet.entries("update"))
    fleet.await_entries("update", updates + 3)
    assert server.running
    assert server.child("mosquitto") == pid, "the broker was started again"
    last = max(entry.round for entry in fleet.entries("report") if entry.device == "board-0")
    assert last < max(entry.round for entry in fleet.entries("update"))
    assert all(board.running for board in boards[1:])
    assert "connected again" not in boards[0].stderr.rpartition("the link was lost")[2]
    # The round that follows does not wait for it either.
    assert all(entry.round <= last + 1 for entry in fleet.entries("report") if entry.device == "board-0")
    # A new board comes in without a restart as well.
    fleet.fedzo("credentials", "issue", "board-0", "--folder", secured.folder)
    boards[0].kill()
    again = secured.device(0)
    again.until("connected to")
    reports = [entry for entry in fleet.entries("report") if entry.device == "board-0"]
    wait_for(
        lambda: sum(entry.device == "board-0" for entry in fleet.entries("report")) > len(reports),
        "a report of the board that was let in again",
        logs=fleet.logs,
    )


def test_a_run_that_somebody_else_signs_is_refused(fleets: MakeFleet, undisturbed: Finished) -> None:
    """The pin of the first run holds over restarts, until it is replaced on purpose."""
    fleet = fleets(devices=2)
    key = fleet.folder / "runs" / "run.key"
    for number in range(2):
        state = fleet.folder / f"state-board-{number}"
        state.mkdir()
        (state / "run-key").write_text("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a\n")
    fleet.serve()
    refused = fleet.device(0)
    assert refused.wait() == 6
    own = RunSigner.open(key).public_key.hex()
    assert f"signed with the key {own}, this device trusts d75a9801" in refused.error["message"]
    assert f"--run-key {own}" in refused.error["hint"]
    assert not (fleet.folder / "state-board-0" / "blobs").exists(), "something was fetched"
    trusting = fleet.device(0, "--run-key", own)
    trusting.until("connected to")
    trusting.until("fits")
    trusting.kill()
    fleet.device(0).until("fits")  # the pin was replaced for good
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_board_that_comes_before_its_server_trusts_no_run_that_is_over(fleets: MakeFleet, mosquitto_url: str) -> None:
    """The broker was used before, with another key, for a run of the same name."""
    fleet = fleets(devices=1, url=mosquitto_url)
    stranger = RunSigner(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    run = RunDocument("small", "00" * 32, 1000, RunSettings())
    over = {Channel.RUN: run.encode(), Channel.HEAD: Announcement("small", 400, "done").encode()}
    before = MqttTransport(mosquitto_url, "before", on_event=lambda _: None)
    before.connect(20.0)
    for channel, document in over.items():
        payload = stranger.sign("default", channel, "", document)
        before.publish(topic("default", channel), payload, retain=True)
    before.close()
    board = fleet.device(0)
    board.until("connected to")
    time.sleep(1.5)  # longer than its tries apart
    pin = fleet.folder / "state-board-0" / "run-key"
    assert not pin.exists()
    server = fleet.serve()
    board.until("from now on")
    assert pin.read_text().strip() == RunSigner.open(fleet.folder / "runs" / "run.key").public_key.hex()
    assert server.answer()["phase"] == "done"
    assert board.answer()["status"] == "done"
