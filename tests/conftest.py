"""Fixtures for every test."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from fedzo.edge_runtime.planning import resident
from tests.board_fixture import board_venv, wheel
from tests.broker_fixtures import broker, connect, mosquitto, proxy

__all__ = ["board_venv", "broker", "connect", "mosquitto", "proxy", "wheel"]

# A limit of wall time for one example says more about a busy machine than about the code.
# On a build machine one commit has one verdict; at a desk every run searches on.
settings.register_profile("fedzo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fedzo")


@pytest.fixture(autouse=True)
def _as_large_as_before() -> Iterator[None]:
    """A device that ran in this process leaves its way with memory to no later test.

    Not by ``monkeypatch``: it would be older than all other fixtures, so that its patches were undone after theirs.
    """
    before = resident._small
    yield
    resident._small = before
