"""Fixtures for every test."""

from tests.board_fixture import board_venv, wheel

__all__ = ["board_venv", "wheel"]
