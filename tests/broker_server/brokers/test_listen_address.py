"""Addresses that cannot be listened at, and the one that others need."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from fedzo.broker_server.brokers.listen_address import choose_port, own_address
from fedzo.protocol.errors import BrokerError

ANY = "0.0.0.0"


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.EADDRNOTAVAIL, "10.1.2.3 is no address of this machine", ANY),
        (errno.EADDRINUSE, "port 1897 on 10.1.2.3 is in use", "--broker mqtt://10.1.2.3:1897"),
        (errno.EACCES, "port 1897 on 10.1.2.3 cannot be bound: Permission denied", "from 1024 up"),
    ],
)
def test_what_the_system_said_decides(number: int, message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whether somebody answers there: a router or a proxy may."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(BrokerError) as caught:
        choose_port("10.1.2.3", 1897)
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_a_host_name_without_an_address() -> None:
    with pytest.raises(BrokerError, match=r"^the host name 'no-such-host\.invalid' has no address"):
        choose_port("no-such-host.invalid", 1883)


def test_the_address_that_others_need() -> None:
    assert own_address("10.1.2.3") == "10.1.2.3"
    found = own_address(ANY)
    assert found is None or choose_port(found, 0) > 0, "it is one of this machine"
