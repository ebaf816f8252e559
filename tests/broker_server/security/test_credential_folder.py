"""The credentials folder: what it holds, who may read it, how devices come, are renewed and go."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedzo.broker_server.brokers.private_files import write_private
from fedzo.broker_server.security.certificates import Authority, check_host
from fedzo.broker_server.security.credential_folder import CredentialFolder
from fedzo.broker_server.security.credential_registry import Registry
from fedzo.edge_runtime.installation.device_bundle import BUNDLE_NAMES, DeviceBundle
from fedzo.protocol.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> CredentialFolder:
    made = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["Server.local", "192.168.1.10"])
    made.issue(["dev-1", "dev-2"])
    return made


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def revoked_serials(folder: CredentialFolder) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl((folder.path / "revoked.pem").read_bytes())}


def test_everything_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = CredentialFolder.create(tmp_path / "deep" / "credentials")
        folder.issue(["dev-1"])
    finally:
        os.umask(before)
    for path in (folder.path, *folder.path.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert not list(folder.path.rglob(".*")), "a temporary file was left"


def test_certificates_say_who_and_for_what(folder: CredentialFolder) -> None:
    authority = certificate(folder.path / "ca.pem")
    server, device = certificate(folder.path / "server.pem"), certificate(folder.path / "devices/dev-1/device.pem")
    now = dt.datetime.now(dt.timezone.utc)
    for issued, name, days in ((server, "fedzo-server", 825), (device, "dev-1", 825), (authority, "fedzo farm", 3650)):
        issued.verify_directly_issued_by(authority)
        assert [a.value for a in issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [name]
        assert abs(issued.not_valid_after_utc - now - dt.timedelta(days=days)) < dt.timedelta(minutes=5)
        assert issued.not_valid_before_utc < now - dt.timedelta(hours=23), "a board's clock may be late"
        assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca == (issued is authority)
    hosts = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["server.local", "localhost"]
    assert ipaddress.ip_address("192.168.1.10") in hosts.get_values_for_type(x509.IPAddress)
    usages = {issued: set(issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
              for issued in (server, device)}  # fmt: skip
    assert usages[device] == {ExtendedKeyUsageOID.CLIENT_AUTH}, "a device must not be able to play the broker"
    assert ExtendedKeyUsageOID.SERVER_AUTH in usages[server]
    serials = [certificate(path).serial_number for path in folder.path.rglob("*.pem") if "revoked" not in path.name]
    assert len(set(serials)) == 4, "ca, server and two devices"


def test_a_bundle_is_all_that_a_board_needs(folder: CredentialFolder, tmp_path: Path) -> None:
    source = folder.path / "devices" / "dev-1"
    assert {path.name for path in source.iterdir()} == set(BUNDLE_NAMES)
    copied = source.rename(tmp_path / "on-the-board")
    bundle = DeviceBundle.load(copied)
    assert (bundle.federation, bundle.device) == ("farm", "dev-1")
    assert bundle.run_key == folder.signer().public_key
    assert folder.registry.credentials().check_password("dev-1", bundle.password)
    assert not folder.registry.credentials().check_password("dev-2", bundle.password)
    assert bundle.tls.client_context().verify_mode is ssl.CERT_REQUIRED
    assert bundle.password not in repr(bundle)
    everywhere = b"".join(path.read_bytes() for path in (folder.path / "mosquitto").rglob("*") if path.is_file())
    assert bundle.password.encode() not in everywhere, "Mosquitto gets hashes"
    assert folder.join_command("dev-1") == "fedzo-device join mqtts://server.local:8883 --credentials dev-1 --data DATA"


def test_a_renewal_breaks_nothing(folder: CredentialFolder) -> None:
    before = DeviceBundle.load(folder.path / "devices" / "dev-1")
    serial = certificate(folder.path / "devices/dev-1/device.pem").serial_number
    folder.issue(["dev-1"], days=30)
    after = DeviceBundle.load(folder.path / "devices" / "dev-1")
    renewed = certificate(folder.path / "devices/dev-1/device.pem")
    assert after.password == before.password
    assert renewed.serial_number != serial
    assert revoked_serials(folder) == set(), "the old certificate is on the board until the new one is copied"
    folder.revoke("dev-1")
    assert revoked_serials(folder) == {serial, renewed.serial_number}, "both go with the device"


def test_a_revoked_device_is_gone_until_it_is_let_in_again(folder: CredentialFolder) -> None:
    bundle = DeviceBundle.load(folder.path / "devices" / "dev-1")
    serial = certificate(folder.path / "devices/dev-1/device.pem").serial_number
    folder.revoke("dev-1")
    again = CredentialFolder(folder.path)
    for registry in (folder.registry, again.registry):
        assert registry.admitted() == {"dev-2"}
        assert not registry.credentials().knows("dev-1")
    assert not (folder.path / "devices" / "dev-1").exists()
    assert "dev-1" not in (folder.path / "mosquitto" / "passwords").read_text()
    assert (folder.path / "mosquitto" / "revoked.pem").read_bytes() == (folder.path / "revoked.pem").read_bytes()
    with pytest.raises(ConfigError, match="was revoked on 20"):
        folder.revoke("dev-1")
    with pytest.raises(ConfigError, match="no device 'dev-9'"):
        folder.revoke("dev-9")
    folder.issue(["dev-1"])
    assert folder.registry.admitted() == {"dev-1", "dev-2"}
    assert not folder.registry.credentials().check_password("dev-1", bundle.password), "the old password came back"
    assert serial in revoked_serials(folder), "the old certificate came back"


def test_the_brokers_certificate_is_renewed_under_other_names(folder: CredentialFolder) -> None:
    before = folder.registry
    folder.renew_server(hosts=["broker.example"], days=10)
    again = CredentialFolder(folder.path)
    assert again.registry.hosts == ("broker.example", "localhost", "127.0.0.1", "::1")
    assert (again.registry.devices, again.registry.server_password) == (before.devices, before.server_password)
    names = certificate(folder.path / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert "broker.example" in names.value.get_values_for_type(x509.DNSName)


@pytest.mark.parametrize(
    "device", ["", "Dev", "dev/1", "../ca", "dev 1", "#", "+", "fedzo-server", "x" * 49, "dev\n", "dév"]
)
def test_ids_that_cannot_be_used_write_nothing(folder: CredentialFolder, device: str) -> None:
    before = sorted(folder.path.rglob("*"))
    with pytest.raises(ConfigError):
        folder.issue([device])
    assert sorted(folder.path.rglob("*")) == before
    assert CredentialFolder(folder.path).registry == folder.registry


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_a_validity_that_cannot_be_used(folder: CredentialFolder, days: int) -> None:
    with pytest.raises(ConfigError, match="1 to 3650"):
        folder.issue(["dev-3"], days=days)
    assert "dev-3" not in CredentialFolder(folder.path).registry.devices


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    authority, _ = Authority.create("short", days=5)
    issued = authority.issue("dev", days=100)
    assert issued.expires == authority.expires


@pytest.mark.parametrize("host", ["", "a b", "-x", "x-", "a..b", "mqtts://x", "x:1", "*.local", "x" * 64, "a\n"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(ConfigError, match="no host name"):
        check_host(host)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="not empty"):
        CredentialFolder.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(ConfigError, match="no credentials folder"):
        CredentialFolder(tmp_path / "nothing")


def test_commands_at_the_same_time_lose_nothing(folder: CredentialFolder) -> None:
    names = [f"board-{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: CredentialFolder(folder.path).issue([name]), names))
    assert CredentialFolder(folder.path).registry.admitted() == {"dev-1", "dev-2", *names}


def test_issuing_needs_the_authoritys_key_serving_does_not(folder: CredentialFolder, tmp_path: Path) -> None:
    (folder.path / "ca.key").rename(tmp_path / "in-a-safe")
    again = CredentialFolder(folder.path)
    assert again.server_tls.certificate.is_file()
    assert len(again.signer().public_key) == 32
    with pytest.raises(ConfigError, match=r"ca\.key"):
        again.issue(["dev-3"])


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_damaged_registry_is_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Registry.decode(data)


@given(st.data())
def test_a_registry_with_other_values_is_a_config_error_or_a_registry(data: st.DataObject) -> None:
    good = json.loads(GOOD)
    place = data.draw(st.sampled_from([good, good["devices"], good["devices"]["dev-1"], good["revoked_serials"]]))
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2))
    try:
        registry = Registry.decode(json.dumps(good).encode())
    except ConfigError:
        return
    assert Registry.decode(registry.encode()) == registry


GOOD = """{"format": 1, "federation": "farm", "hosts": ["x"], "server_password": "p", "server_expires": "2030-01-01",
"list_number": 2, "devices": {"dev-1": {"password": "q", "hashed": "q", "serials": ["ff"],
"expires": "2030-01-01T00:00:00+00:00", "revoked": ""}}, "revoked_serials": {"a": "2030-01-01T00:00:00+00:00"}}"""


def test_a_registry_comes_back() -> None:
    registry = Registry.decode(GOOD.encode())
    assert Registry.decode(registry.encode()) == registry
    assert registry.devices["dev-1"].serials == (255,)


@pytest.mark.parametrize("name", BUNDLE_NAMES)
def test_an_incomplete_bundle_is_named(folder: CredentialFolder, name: str) -> None:
    path = folder.path / "devices" / "dev-1"
    (path / name).unlink()
    with pytest.raises(ConfigError, match=name) as caught:
        DeviceBundle.load(path)
    assert "fedzo credentials issue" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"device": "a/b"}, {"federation": 3}, {"password": ""}, {"password": "a\nb"}, {"run_key": "zz"},
     {"run_key": "00" * 32}, {"more": 1}],
)  # fmt: skip
def test_a_bundle_that_says_something_else_is_refused(folder: CredentialFolder, change: dict[str, object]) -> None:
    path = folder.path / "devices" / "dev-1" / "device.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"device\.json cannot be used"):
        DeviceBundle.load(path.parent)


@pytest.mark.parametrize("bad", ["..", "BAD", "fedzo-server"])
def test_one_bad_name_among_good_ones_writes_nothing(folder: CredentialFolder, bad: str) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        folder.issue(["dev-1", "kitchen", bad])
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert folder.registry == CredentialFolder(folder.path).registry


def test_no_certificate_is_on_the_disk_before_its_serial_number(
    folder: CredentialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CredentialFolder._write_bundle

    def full_after_one(self: CredentialFolder, bundle: DeviceBundle, *files: bytes) -> None:
        if bundle.device == "dev-4":
            raise ConfigError("the disk is full")
        real(self, bundle, *files)

    monkeypatch.setattr(CredentialFolder, "_write_bundle", full_after_one)
    with pytest.raises(ConfigError, match="full"):
        folder.issue(["dev-1", "dev-3", "dev-4"])
    again = CredentialFolder(folder.path)
    for name in ("dev-1", "dev-3"):
        serial = certificate(folder.path / "devices" / name / "device.pem").serial_number
        assert serial in again.registry.devices[name].serials
        again.revoke(name)
        assert serial in revoked_serials(again)
    assert again.registry.devices["dev-4"].serials
    assert not (folder.path / "devices" / "dev-4").exists()


def test_a_federation_whose_name_is_too_long_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a valid name"):
        CredentialFolder.create(tmp_path / "credentials", federation="f" * 60, hosts=["x"])
    assert not (tmp_path / "credentials").exists()
    assert CredentialFolder.create(tmp_path / "other", federation="f" * 48, hosts=["x"]).registry.hosts


def test_a_replaced_file_and_then_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[bool]()
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        assert (tmp_path / "file").exists() == synced[-1], "the folder is synced after the rename"
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_private(tmp_path / "file", b"x")
    assert synced == [False, True]
