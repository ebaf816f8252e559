"""Log lines for people and for machines."""

from __future__ import annotations

import errno
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime import logs as logs_module
from fedzo.edge_runtime.logs import FILES, Logs
from fedzo.protocol.errors import ConfigError

_log = logging.getLogger("fedzo.tests")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_json_line_says_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json")
    logs.context["run"] = "run-1"
    _log.info("plain")
    _log.warning("refused: %s", "why", extra={"event": "refused", "round": 3, "device": "pi-1", "fields": {"n": 2}})
    _log.debug("too much")
    logs.say("for people")
    logs.close()
    _log.error("after the end, which is for pytest alone")
    plain, refused, said = lines(capsys.readouterr().err)
    assert plain.keys() == {"ts", "level", "event", "message", "run", "logger"}
    assert (plain["level"], plain["event"], plain["message"], plain["run"]) == ("info", "log", "plain", "run-1")
    assert len(plain["ts"]) == len("2026-01-01T00:00:00.000Z")
    assert (refused["event"], refused["round"], refused["device"], refused["fields"]) == (
        "refused",
        3,
        "pi-1",
        {"n": 2},
    )
    assert (said["event"], said["message"]) == ("message", "for people")


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", 'quotes " and \\', "\ud800 alone", "\u2028", "ü"], ids=ascii)
def test_whatever_a_peer_says_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json")
    _log.warning("%s", text, extra={"device": text})
    logs.close()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.isascii()
    assert json.loads(err)["message"] == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", {1, 2}], ids=str)
def test_a_field_without_json_form_is_text(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json")
    _log.warning("odd", extra={"fields": {"value": value, "fine": 1}})
    logs.close()
    (line,) = lines(capsys.readouterr().err)
    assert line["fields"] == {"value": str(value), "fine": "1"}


def test_a_traceback_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json")
    try:
        raise ValueError("inside")
    except ValueError:
        _log.exception("failed")
    logs.close()
    (line,) = lines(capsys.readouterr().err)
    assert "ValueError: inside" in line["traceback"]


def test_text_shows_warnings_with_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs()
    _log.info("hidden")
    _log.warning("bad \x1b[2J name")
    logs.say("hello\x07")
    logs.close()
    assert capsys.readouterr().err == "warning: bad \\x1b[2J name\nhello\\x07\n"


def test_a_file_gets_everything_and_stderr_the_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json", tmp_path / "log")
    _log.info("quiet")
    _log.warning("loud")
    logs.say("for people")
    logs.close()
    assert capsys.readouterr().err == "warning: loud\nfor people\n"
    assert [line["message"] for line in lines((tmp_path / "log").read_text())] == ["quiet", "loud", "for people"]


def test_text_in_a_file_has_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("text", tmp_path / "log")
    _log.info("quiet")
    logs.say("for people\x1b")
    logs.close()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("Z info: quiet")
    assert second.endswith("Z info: for people\\x1b")
    assert capsys.readouterr().err == "for people\\x1b\n"


def test_a_flood_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "FILE_BYTES", 2000)
    logs = Logs("json", tmp_path / "log")
    for number in range(2000):
        _log.info("line %d", number)
    logs.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == FILES + 1
    assert all(file.stat().st_size <= 2000 for file in files)
    assert lines((tmp_path / "log").read_text())[-1]["message"] == "line 1999"
    assert all(lines(file.read_text()) for file in files), "no line is cut in two"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        Logs("json", tmp_path / "absent" / "log")


class FullDisk(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs("json", tmp_path / "log")
    (handler,) = [handler for handler in logs._handlers if isinstance(handler, logging.FileHandler)]
    assert handler.stream is not None
    handler.stream.close()
    handler.stream = FullDisk()  # type: ignore[assignment]  # a text stream, but not of a file
    for _ in range(3):
        _log.info("lost")
    logs.close()
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize(
    ("form", "level", "seen"),
    [("text", None, ["w"]), ("json", None, ["i", "w"]), ("json", "debug", ["d", "i", "w"]), ("text", "error", [])],
)
def test_levels(form: Any, level: Any, seen: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("fedzo").level
    logs = Logs(form, None, level)
    _log.debug("d")
    _log.info("i")
    _log.warning("w")
    logs.close()
    err = capsys.readouterr().err
    assert [line.removeprefix("warning: ") if form == "text" else json.loads(line)["message"]
            for line in err.splitlines()] == seen  # fmt: skip
    assert logging.getLogger("fedzo").level == before
