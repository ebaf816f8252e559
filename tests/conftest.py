"""Fixtures for every test."""

from hypothesis import settings

from tests.board_fixture import board_venv, wheel
from tests.broker_fixtures import broker, connect, mosquitto, proxy

__all__ = ["board_venv", "broker", "connect", "mosquitto", "proxy", "wheel"]

# A limit of wall time for one example says more about a busy machine than about the code.
settings.register_profile("fedzo", deadline=None)
settings.load_profile("fedzo")
