"""The folder of `fedzo credentials issue` in the board's other commands: `doctor` and `install`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.broker_server.security.credential_folder import CredentialFolder
from fedzo.edge_runtime.connection.broker_check import BrokerAccess, broker_findings
from fedzo.edge_runtime.installation.device_bundle import BUNDLE_NAMES, DeviceBundle
from fedzo.edge_runtime.installation.systemd import UnitSettings, install, unit_text
from fedzo.protocol.errors import BrokerError, ConfigError
from tests.broker_fixtures import needs_mosquitto


@pytest.fixture
def folder(tmp_path: Path) -> CredentialFolder:
    made = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["localhost"])
    made.issue(["kitchen"])
    return made


@needs_mosquitto
def test_doctor_sees_what_the_bundle_is_worth(folder: CredentialFolder) -> None:
    bundle = DeviceBundle.load(folder.path / "devices" / "kitchen")
    with MosquittoBroker(port=0, credentials=folder.registry.credentials(), tls=folder.server_tls) as broker:
        access = BrokerAccess(f"mqtts://localhost:{broker.port}", "farm", "kitchen", timeout_s=10.0, bundle=bundle)
        found = {name: (detail, warning) for name, detail, warning in broker_findings(access)}
        assert "the certificate is valid for 82" in found["broker TLS"][0]
        assert found["broker session"] == ("MQTT 5 as kitchen, kitchen may subscribe", "")
        folder.issue(["attic"])
        other = DeviceBundle.load(folder.path / "devices" / "attic")  # which the broker was not told of
        with pytest.raises(BrokerError, match="refused"):
            list(broker_findings(BrokerAccess(access.url, "farm", "attic", timeout_s=5.0, bundle=other)))


def test_a_service_gets_its_files_from_systemd(folder: CredentialFolder, tmp_path: Path) -> None:
    bundle = folder.path / "devices" / "kitchen"
    data = tmp_path / "data.npz"
    data.write_bytes(b"")
    settings = UnitSettings("mqtts://x", data, "rpi-zero-2w", federation="farm", credentials=bundle)
    text = unit_text(settings)
    for name in BUNDLE_NAMES:
        assert f"LoadCredential={name}:{bundle / name}\n" in text
    assert "--credentials ${CREDENTIALS_DIRECTORY}\n" in text
    assert str(bundle) not in text.partition("ExecStart=")[2].partition("\n")[0]
    with pytest.raises(ConfigError, match="for the federation farm, not for default"):
        UnitSettings("mqtts://x", data, "rpi-zero-2w", credentials=bundle)
    with pytest.raises(ConfigError, match="holds user, password"):
        UnitSettings("mqtts://x", data, "rpi-zero-2w", federation="farm", credentials=bundle, username="x")
    with pytest.raises(ConfigError, match=r"has no ca\.pem"):
        UnitSettings("mqtts://x", data, "rpi-zero-2w", federation="farm", credentials=tmp_path)
    path, _ = install(settings, folder=tmp_path)
    assert path.read_text() == text
