"""`fedzo broker check`: whether a broker gives what fedzo needs, tried with throw-away clients."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...edge_runtime.connection.broker_check import BrokerAccess, address_findings
from ...edge_runtime.connection.endpoint import Endpoint, TlsConfig
from ...edge_runtime.connection.mqtt_types import ProtocolName
from ...protocol.errors import BrokerError, ConfigError
from ...protocol.wire.topics import Channel, check_name, topic
from .device_rights import device_rights
from .probe_client import Place, ProbeClient, ProbeLost, wait
from .probes import ALL_PROBES, Finding, Probes

__all__ = ["BrokerCheck", "Finding", "verdict"]

_KICKED_S = 0.5


@dataclass(frozen=True)
class BrokerCheck:
    """What to check.

    Attributes:
        access: The broker, and a login that may read and write everything below the federation's topics.
        devices: How many boards the broker should serve.
        device: Login of a board whose rights are tried as well.
        password: Instead of the one that `access` leads to.
        probes: Names of probes, in the order of ``ALL_PROBES``.
    """

    access: BrokerAccess
    devices: int = 100
    device: BrokerAccess | None = None
    password: str | None = field(default=None, repr=False)
    probes: tuple[str, ...] = ALL_PROBES

    def findings(self) -> Iterator[Finding]:
        """Try everything.

        Raises:
            BrokerError: No connection, or the login belongs to a client with a session that would be lost.
            ConfigError: A setting cannot be used.
            OSError: The address cannot be reached, or TLS fails.
        """
        access = self.access
        prefix = topic(access.federation, Channel.SERVER).removesuffix(f"/{Channel.SERVER.value}")
        if not 1 <= self.devices <= 100_000:
            raise ConfigError(f"{self.devices} boards; allowed are 1 to 100000")
        name = self.device.device if self.device is not None else None
        if name is not None:
            check_name("device", name)
        place = _place(access, access.username, access.password() if self.password is None else self.password)
        for what, detail, hint in address_findings(access):
            yield Finding(what.removeprefix("broker "), "warn" if hint else "ok", detail, hint)
        protocol = self._protocol(place)
        older = "" if protocol == "5" else "; without MQTT 5 nobody says why something is refused"
        yield Finding("protocol", "ok", f"MQTT {protocol}{older}")
        yield from self._strangers(place, protocol)
        own_ids, first = self._identity(place, protocol)
        yield from first
        probes = Probes(place, prefix, protocol=protocol, devices=self.devices, own_ids=own_ids)
        yield from probes.run(self.probes)
        if self.device is not None and name is not None:
            device = _place(self.device, name, self.device.password())
            yield from device_rights(place, device, prefix, name, protocol=protocol)

    def _protocol(self, place: Place) -> ProtocolName:
        """The best version that the broker speaks; asks as the first client, with care for sessions."""
        reasons = []
        for protocol in ("5", "3.1.1"):
            try:
                self._look(place, protocol)
            except ProbeLost as lost:
                reasons.append(str(lost))
            else:
                return protocol
        where = place.endpoint.address
        hint = "check user name, password and certificate"
        raise BrokerError(f"no session with the broker {where}: {reasons[0]}; with 3.1.1: {reasons[1]}", hint=hint)

    def _look(self, place: Place, protocol: ProtocolName) -> None:
        """Connect once under a new id, without throwing anything away."""
        client = ProbeClient(place, _new_id(), protocol=protocol, clean=False, expiry_s=86_400, manual_ack=True)
        client.leave()
        if client.session_present:
            raise BrokerError(
                f"the broker keeps a session of the login {place.username!r}, which this check would end",
                hint="give the check a login of its own, with the rights of the server",
            )
        ProbeClient(place, client.client_id, protocol=protocol).leave()  # the session that this left behind

    def _strangers(self, place: Place, protocol: ProtocolName) -> Iterator[Finding]:
        """Whether somebody without credentials gets in."""
        nobody = replace(place, username=None, password=None)
        if place.tls is not None:
            ca = self.access.bundle.tls.ca if self.access.bundle is not None else self.access.ca
            nobody = replace(nobody, tls=TlsConfig(ca).client_context())
        hint = "set passwords and topic rights, or use it on a network of your own only"
        try:
            ProbeClient(nobody, _new_id(), protocol=protocol).leave()
        except ProbeLost as lost:
            yield Finding("strangers", "ok", f"refused: {lost}")
        else:
            yield Finding("strangers", "warn", "whoever reaches the broker gets in without credentials", hint)

    def _identity(self, place: Place, protocol: ProtocolName) -> tuple[bool, list[Finding]]:
        """Whether clients of one login may have ids of their own, and what the broker announces."""
        one = two = None
        try:
            one = ProbeClient(place, _new_id(), protocol=protocol)
            two = ProbeClient(place, _new_id(), protocol=protocol)
            wait([one], lambda: one.loss is not None, _KICKED_S)
            own_ids = one.loss is None
            said = ", ".join(f"{name} {value}" for name, value in sorted(two.limits.items()))
        except ProbeLost as lost:
            raise BrokerError(f"no second client: {lost}", hint="raise the broker's limit of connections") from None
        finally:
            for client in filter(None, (one, two)):
                client.leave()
        findings = [Finding("announced limits", "ok", said or "none")]
        if own_ids and place.username is not None:
            detail = "clients of one login may have any id: with a login of its own, a device throws out another"
            findings.append(Finding("client ids", "warn", detail, "bind them: use_username_as_clientid in Mosquitto"))
        elif not own_ids:
            findings.append(Finding("client ids", "ok", "bound to the login"))
        return own_ids, findings


def verdict(findings: list[Finding]) -> None:
    """Raise if fedzo cannot work with this broker.

    Raises:
        BrokerError: It names what is missing.
    """
    missing = [finding.name for finding in findings if finding.status == "fail"]
    if missing:
        raise BrokerError(
            f"this broker lacks what fedzo needs: {', '.join(missing)}", hint="docs/brokers.md has settings"
        )


def _place(access: BrokerAccess, username: str | None, password: str | None) -> Place:
    endpoint = Endpoint.parse(access.url)
    if username is None and password is None:
        username, password = endpoint.username, endpoint.password
    return Place(endpoint, endpoint.tls_context(access.tls()), username, password, access.timeout_s)


def _new_id() -> str:
    return f"fedzo-probe-{secrets.token_hex(4)}"
