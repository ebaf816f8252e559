"""What boards are told to join with."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.cli import serve_access
from fedzo.cli.output import Output
from fedzo.cli.serve_access import ServeAccess
from fedzo.cli.serve_settings import ServeSettings
from tests.broker_fixtures import needs_mosquitto

ANY = "0.0.0.0"


@needs_mosquitto
@pytest.mark.parametrize("found", ["10.1.2.3", None])
def test_boards_are_told_an_address_that_they_can_reach(
    found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_access, "own_address", lambda _: found)
    access = ServeAccess(ServeSettings(artifact=tmp_path, host=ANY, port=0, broker="mosquitto"), tmp_path)
    access.broker.start()
    try:
        port = access.broker.url.rpartition(":")[2]
        access.tell(Output())
    finally:
        access.broker.stop()
    said = capsys.readouterr().err
    assert "warning: whoever reaches this broker may do everything: it asks for no password\n" in said
    assert f"devices join with: fedzo-device join mqtt://{found or '127.0.0.1'}:{port} --federation default" in said
    assert ("this machine's address" in said) is (found is None)
