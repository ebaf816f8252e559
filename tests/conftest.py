"""Fixtures for every test."""

from tests.board_fixture import board_venv, wheel
from tests.broker_fixtures import broker, connect, mosquitto, proxy

__all__ = ["board_venv", "broker", "connect", "mosquitto", "proxy", "wheel"]
