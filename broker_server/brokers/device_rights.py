"""What a device's login may do at a broker: its own topics, and nobody else's.

Rights may name every topic, so real ones are tried, with empty payloads: servers and devices ignore those.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

from ...edge_runtime.connection.mqtt_types import ProtocolName, Will
from .probe_client import Place, ProbeClient, ProbeLost, wait
from .probes import Finding

__all__ = ["device_rights"]

_QUIET_S = 0.6
_ARRIVE_S = 5.0


def device_rights(server: Place, device: Place, prefix: str, name: str, *, protocol: ProtocolName) -> Iterator[Finding]:
    """Try the rights of one device.

    Args:
        server: Login that may read and write everything below ``prefix``.
        device: Login of the device.
        prefix: Topics of the federation, without the last slash.
        name: The device's id. A device of this id that is at work may lose its link for a moment.
        protocol: MQTT version.

    Yields:
        Findings: ``fail`` for a right that is missing, ``warn`` for one too many.
    """
    other = f"fedzo-probe-{secrets.token_hex(4)}"
    try:
        witness = ProbeClient(server, f"{other}-witness", protocol=protocol)
    except ProbeLost as lost:
        yield Finding("rights of a device", "skip", str(lost))
        return
    try:
        witness.subscribe([f"{prefix}/d/{name}/get", f"{prefix}/d/{other}/get", f"{prefix}/log"])
        try:
            yield from _own(witness, device, prefix, name, protocol)
        except ProbeLost as lost:
            yield Finding("rights: own topics", "fail", str(lost), "see its credentials and topic rights")
            return
        yield _foreign(witness, device, prefix, name, other, protocol)
        yield _ears(witness, device, prefix, name, other, protocol)
        yield _foreign_will(witness, device, prefix, name, other, protocol)
    except ProbeLost as lost:
        yield Finding("rights of a device", "skip", f"the own login lost its link: {lost}")
    finally:
        witness.leave()


def _own(witness: ProbeClient, place: Place, prefix: str, name: str, protocol: ProtocolName) -> Iterator[Finding]:
    client = ProbeClient(place, name, protocol=protocol)
    try:
        granted = client.subscribe([f"{prefix}/s/{name}/block"])[0]
        refusal = client.publish([(f"{prefix}/d/{name}/get", b"")])[0]
        heard = wait([witness, client], lambda: bool(witness.arrived), _ARRIVE_S)
        if refusal is not None or not heard:
            detail = f"{name} cannot write below d/{name}: {refusal or 'nothing arrived'}"
            yield Finding("rights: own topics", "fail", detail, "let it write there")
            return
        witness.publish([(f"{prefix}/s/{name}/block", b"")], others=[client])
        if granted >= 128 or not wait([client], lambda: bool(client.arrived), _ARRIVE_S):
            detail = f"{name} cannot read below s/{name}"
            yield Finding("rights: own topics", "fail", detail, "let it read there")
            return
        yield Finding("rights: own topics", "ok", f"{name} writes below d/{name} and reads below s/{name}")
    finally:
        client.leave()


def _foreign(witness: ProbeClient, place: Place, prefix: str, name: str, other: str, protocol: ProtocolName) -> Finding:
    witness.arrived.clear()
    for topic in (f"{prefix}/d/{other}/get", f"{prefix}/log"):
        with contextlib.suppress(ProbeLost):  # A broker may cut off who tries.
            client = ProbeClient(place, name, protocol=protocol)
            try:
                client.publish([(topic, b"")])
            finally:
                client.leave()
    wait([witness], lambda: False, _QUIET_S)
    if witness.arrived:
        where = ", ".join(sorted({message.topic.removeprefix(f"{prefix}/") for message in witness.arrived}))
        return Finding("rights: foreign voices", "warn", f"{name} may write on {where}", _HINT)
    return Finding("rights: foreign voices", "ok", f"{name} writes neither as another device nor as the server")


def _ears(witness: ProbeClient, place: Place, prefix: str, name: str, other: str, protocol: ProtocolName) -> Finding:
    topic = f"{prefix}/s/{other}/block"
    heard = False
    with contextlib.suppress(ProbeLost):
        client = ProbeClient(place, name, protocol=protocol)
        try:
            client.subscribe([topic])
            witness.publish([(topic, b"")], others=[client])
            heard = wait([client], lambda: bool(client.arrived), _QUIET_S)
        finally:
            client.leave()
    if heard:
        return Finding("rights: foreign ears", "warn", f"{name} may read what is sent to other devices", _HINT)
    return Finding("rights: foreign ears", "ok", f"{name} hears nothing that is sent to other devices")


def _foreign_will(
    witness: ProbeClient, place: Place, prefix: str, name: str, other: str, protocol: ProtocolName
) -> Finding:
    witness.arrived.clear()
    with contextlib.suppress(ProbeLost):
        will = Will(f"{prefix}/d/{other}/get", b"forged", retain=False)
        ProbeClient(place, name, protocol=protocol, will=will).cut()
    if wait([witness], lambda: bool(witness.arrived), 2 * _QUIET_S):
        return Finding("rights: foreign wills", "warn", f"the will of {name} may speak for other devices", _HINT)
    return Finding("rights: foreign wills", "ok", f"the will of {name} speaks for {name} only")


_HINT = "give devices the topic rights of docs/brokers.md"
