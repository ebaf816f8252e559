"""Who takes part while a server runs: what changes in the folder reaches broker and coordinator, and what fails, fails
for the broker alone."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.credentials import Credentials
from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.intake import Drops, Intake
from fedzo.broker_server.security import access as module
from fedzo.broker_server.security.access import Access, AccessWatch
from fedzo.broker_server.security.credential_folder import REGISTRY_NAME, CredentialFolder
from fedzo.edge_runtime.connection.mqtt_types import Arrived
from fedzo.protocol.errors import BrokerError
from fedzo.protocol.server_side.coordinator_events import DeviceSaid
from fedzo.protocol.wire.documents import Hello
from fedzo.protocol.wire.topics import Channel, topic
from tests.broker_fixtures import wait_until

HELLO = Hello(1, "", 64.0, 10, 5, "none", "none").encode()


class Broker(ExternalBroker):
    """Remembers what it was told, or refuses."""

    def __init__(self) -> None:
        super().__init__("mqtt://127.0.0.1:1")
        self.told: list[Credentials] = []
        self.refuses = False
        self.error: Exception = BrokerError("not now")
        self.takes = True

    def update_credentials(self, credentials: Credentials) -> bool:
        if self.refuses:
            raise self.error
        self.told.append(credentials)
        return self.takes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CredentialFolder:
    monkeypatch.setattr(module, "WATCH_S", 0.02)
    made = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["x"])
    made.issue(["dev-1", "dev-2"])
    return made


def test_only_who_is_admitted_is_heard(folder: CredentialFolder) -> None:
    access, drops = Access(folder.signer(), folder), Drops()
    intake = Intake("farm", drops, access)

    def is_heard(device: str) -> bool:
        event = intake.event(Arrived(topic("farm", Channel.HELLO, device), HELLO, False, None))
        return isinstance(event, DeviceSaid)

    assert [is_heard(name) for name in ("dev-1", "dev-2", "stranger")] == [True, True, False]
    assert drops.counts["strangers"] == 1
    access.admit(frozenset({"dev-2"}))
    assert [is_heard(name) for name in ("dev-1", "dev-2")] == [False, True]
    garbled = Arrived(topic("farm", Channel.REPORT, "dev-1"), b"garbled", False, None)
    assert intake.event(garbled) is None, "the journal must not grow for those without rights"
    assert Access(folder.signer()).admits("anybody"), "without credentials everybody takes part"


def test_a_change_of_the_folder_takes_effect(folder: CredentialFolder, caplog: pytest.LogCaptureFixture) -> None:
    serving, broker, dismissed = CredentialFolder(folder.path), Broker(), list[frozenset[str]]()
    access = Access(serving.signer(), serving)
    folder.revoke("dev-2")  # between the opening of the folder and the watch
    with AccessWatch(serving, access, broker, dismissed.append):
        wait_until(lambda: len(broker.told) == 1)
        assert not access.admits("dev-2")
        assert not broker.told[0].knows("dev-2")
        folder.issue(["dev-3"])
        wait_until(lambda: len(broker.told) == 2)
        assert access.admits("dev-3")
        broker.refuses = True
        folder.revoke("dev-1")
        wait_until(lambda: not access.admits("dev-1"))
        time.sleep(0.2)
        assert len(broker.told) == 2
        broker.refuses = False  # it is tried again, though nothing has changed since
        wait_until(lambda: len(broker.told) == 3)
        assert not broker.told[-1].knows("dev-1")
    assert dismissed[0] == {"dev-1", "dev-2"}
    assert dismissed[-1] == {"dev-3"}
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failures) == 1, "once, not once a second"


@pytest.mark.parametrize("error", [OSError("no child"), KeyError("no user")])
def test_no_error_of_the_broker_ends_the_watch(folder: CredentialFolder, error: Exception) -> None:
    broker, access = Broker(), Access(folder.signer(), folder)
    broker.refuses, broker.error = True, error
    with AccessWatch(CredentialFolder(folder.path), access, broker, lambda _: None):
        folder.revoke("dev-1")
        wait_until(lambda: not access.admits("dev-1"))
        time.sleep(0.1)
        broker.refuses = False
        wait_until(lambda: len(broker.told) == 1)


@pytest.mark.parametrize("takes", [True, False])
def test_in_force_is_said_only_where_it_is_so(
    folder: CredentialFolder, takes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broker, access = Broker(), Access(folder.signer(), folder)
    broker.takes = takes
    with AccessWatch(CredentialFolder(folder.path), access, broker, lambda _: None):
        folder.revoke("dev-1")
        wait_until(lambda: "the credentials have changed" in caplog.text)
    assert ("are in force" in caplog.text) == takes
    assert ("told to reload" in caplog.text) != takes
    assert ExternalBroker("mqtt://x").update_credentials(folder.registry.credentials()) is False


def test_a_damaged_registry_changes_nothing(folder: CredentialFolder) -> None:
    broker = Broker()
    access = Access(folder.signer(), folder)
    with AccessWatch(folder, access, broker, lambda _: None):
        path = folder.path / REGISTRY_NAME
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        time.sleep(0.2)
        assert access.admits("dev-1")
        assert broker.told == []
        path.write_bytes(good)
        wait_until(lambda: len(broker.told) == 1)
