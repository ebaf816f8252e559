"""`fedzo status`: out of journals that grow, that were cut off, and that are none."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.broker_server.history.replay import begin_run
from fedzo.broker_server.history.run_status import RunFollower, server_process
from fedzo.broker_server.journal import Entry, SqliteJournal
from fedzo.broker_server.telemetry.live_file import live_url, noted
from fedzo.broker_server.telemetry.scrape import scrape
from fedzo.cli.main import main
from fedzo.protocol.errors import ArtifactError, ConfigError
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Announcement, Hello, Phase, RunDocument, pack_participants
from fedzo.protocol.wire.messages import Decline, Report, ReportKind, UpdateRecord

RUN = RunDocument("run-1", "ab" * 32, 100, RunSettings(devices=3, quorum=2))
DEVICES = ("pi-c", "pi-a", "pi-b")  # in the order of enrolment; numbered by name


class Writer:
    """Plays the server that writes the journal; a minute a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.journal = SqliteJournal(folder / "journal.sqlite")
        begin_run(self.journal, RUN)
        self.at = time.time() - 7200

    def add(self, kind: Any, round_: int = 0, device: str = "", payload: bytes = b"") -> None:
        self.at += 60
        self.journal.append([Entry(kind, round_, device, payload, self.at)])

    def enrol(self, *devices: str) -> None:
        for device in devices:
            self.add("enrolment", 0, device, Hello(1, "", 512.0, 8, 2, "", "").encode())

    def announce(self, round_: int, phase: Phase = "train", who: tuple[int, ...] = (0, 1, 2)) -> None:
        packed = pack_participants(np.array(who, dtype=np.int64))
        head = Announcement("run-1", round_, phase, packed, weights_digest=f"{round_:032x}")
        self.add("announce", round_, "", head.encode())

    def report(self, round_: int, device: str, loss: float = 2.0, decline: Decline = Decline.NONE) -> None:
        blocks = () if decline is not Decline.NONE else (np.ones(4, dtype=np.float32),)
        said = Report(
            ReportKind.PROBE, RUN.tag, round_, 1, 8, bytes(16), loss, 5, 1500, 40 << 10, blocks, decline=decline
        )
        self.add("report", round_, device, said.encode())

    def update(self, round_: int, index: int) -> None:
        record = UpdateRecord(index, round_, 0.5, ((0, 4),), np.ones(4, dtype=np.float32), bytes(16), bytes(16))
        self.add("update", round_, "", record.encode())

    def rounds(self, count: int) -> None:
        self.enrol(*DEVICES)
        for round_ in range(1, count + 1):
            self.announce(round_)
            for device in DEVICES:
                self.report(round_, device)
            self.update(round_, round_ - 1)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path / "run-1")
    yield made
    made.journal.close()


def test_a_run_that_waits_for_devices(writer: Writer) -> None:
    writer.enrol("pi-a")
    with RunFollower(writer.folder) as follower:
        status = follower.poll()
    assert (status.phase, status.round, status.updates, status.devices) == ("enrol", 0, 0, 1)
    assert (status.states, status.participants, status.rounds_per_minute) == ({"idle": 1}, 0, None)
    assert status.quorum == 2


def test_states_of_devices_in_an_open_round(writer: Writer) -> None:
    writer.enrol("pi-d", *DEVICES)
    writer.announce(1, who=(0, 1, 2))
    writer.report(1, "pi-a", loss=1.0)
    writer.report(1, "pi-b", decline=Decline.OVER_BUDGET)
    writer.add("refusal", 1, "pi-c", b"made with other weights")
    writer.enrol("pi-0")  # too late to be numbered by name
    with RunFollower(writer.folder) as follower:
        status = follower.poll()
        states = {row.name: row.state for row in status.rows}
        assert states == {"pi-c": "refused", "pi-b": "declined", "pi-a": "reported", "pi-d": "idle", "pi-0": "idle"}
        assert [row.state for row in status.rows][:2] == ["refused", "declined"], "what needs a look comes first"
        assert (status.participants, status.answered, status.loss) == (3, 2, 1.0)
        assert (status.refused, status.refusals) == (1, {"weights": 1})
        writer.announce(2, who=(3, 4))
        states = {row.name: row.state for row in follower.poll().rows}
        assert states == {"pi-a": "idle", "pi-b": "idle", "pi-c": "idle", "pi-d": "waiting", "pi-0": "waiting"}


@pytest.mark.parametrize("rounds", [1, 2, 3, 30])
def test_beginning_late_gives_what_following_from_the_start_gives(writer: Writer, rounds: int) -> None:
    with RunFollower(writer.folder) as early:
        early.poll()
        writer.rounds(rounds)
        writer.add("evaluation", rounds, "", json.dumps({"accuracy": 0.5, "server_accuracy": 0.75}).encode())
        writer.announce(rounds + 1)
        writer.report(rounds + 1, "pi-b", loss=0.5)
        with RunFollower(writer.folder) as late:
            one, other = early.poll(), late.poll()
    for name in ("phase", "round", "updates", "reports", "states", "accuracy", "loss", "rounds_per_minute",
                 "reports_per_minute", "started_at", "last_at", "weights_digest"):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    assert (other.updates, other.reports, other.accuracy) == (rounds, 3 * rounds + 1, 0.75)
    assert other.rounds_per_minute == pytest.approx(1 / (5 if rounds > 1 else 6), rel=0.25)


def test_a_stop_and_the_round_after_it(writer: Writer) -> None:
    writer.rounds(3)
    writer.add("phase", 3, "", b"stopped: too few devices")
    with RunFollower(writer.folder) as follower:
        status = follower.poll()
        assert (status.phase, status.reason, status.participants) == ("stopped", "too few devices", 0)
        writer.announce(4)
        assert (follower.poll().phase, follower.poll().reason) == ("train", "")


def test_the_end(writer: Writer) -> None:
    writer.rounds(3)
    writer.announce(4, "done", ())
    for device in DEVICES[:2]:
        writer.add("phase", 4, device, b"done " + b"ab" * 16)
    writer.add("phase", 4, "", b"done")
    with RunFollower(writer.folder) as follower:
        status = follower.poll()
    assert (status.phase, status.states) == ("done", {"done": 2, "idle": 1})


def test_who_serves_a_run_is_seen_without_touching_its_lock(writer: Writer) -> None:
    journal = writer.folder / "journal.sqlite"
    assert server_process(journal) == os.getpid()
    writer.journal.close()
    assert server_process(journal) is None
    SqliteJournal(journal).close()  # and it can be taken again
    assert server_process(journal.with_name("absent")) is None


# ---------------------------------------------------------------------- what is no run


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFollower(tmp_path)
    assert main(["status", str(tmp_path / "absent")]) == 3
    assert "hint: " in capsys.readouterr().err


def test_a_run_that_was_killed_as_it_began(tmp_path: Path) -> None:
    SqliteJournal(tmp_path / "journal.sqlite").close()
    with pytest.raises(ArtifactError, match="empty"):
        RunFollower(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no database at all" * 300], ids=["empty", "foreign"])
def test_a_damaged_journal(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.sqlite").write_bytes(content)
    assert main(["status", str(tmp_path), "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "ArtifactError"


def test_a_journal_with_a_damaged_page(writer: Writer, tmp_path: Path) -> None:
    writer.rounds(20)
    writer.journal.close()
    path = writer.folder / "journal.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    assert main(["status", str(writer.folder)]) == 6


# ---------------------------------------------------------------------- the command


def test_the_command(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    writer.rounds(2)
    writer.announce(3)
    assert main(["status", str(writer.folder)]) == 0
    out = capsys.readouterr().out
    assert "state\ttrain; served by process" in out
    assert "round\t3; 0 of 3 devices answered, quorum 2" in out
    assert "pi-a\twaiting\tround 2" in out
    writer.journal.close()
    assert main(["status", str(writer.folder), "--json", "--devices", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["phase"], answer["server_pid"], answer["live"]) == ("train", None, None)
    assert (answer["states"], len(answer["rows"])) == ({"waiting": 3}, 1)
    assert main(["status", str(writer.folder)]) == 0
    assert f"go on with\tfedzo serve --resume {writer.folder}" in capsys.readouterr().out


def test_a_board_that_takes_no_part_is_called_refused_while_the_server_runs(
    writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.enrol("pi-a", "pi-b")
    with noted(writer.folder, "") as keep:
        keep({"pi-b": "over the memory budget"})
        assert main(["status", str(writer.folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["state"]) for row in answer["rows"]] == [("pi-b", "refused"), ("pi-a", "idle")]
    assert answer["states"] == {"refused": 1, "idle": 1}


def test_watching_and_json_exclude_each_other(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(writer.folder), "--watch", "--json"]) == 3
    assert "one object" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_the_live_display_can_be_drawn(writer: Writer, tmp_path: Path) -> None:
    from rich.console import Console

    from fedzo.broker_server.telemetry.scrape import LiveState
    from fedzo.cli.status_view import _display, _rates

    writer.rounds(2)
    writer.announce(3)
    writer.add("phase", 3, "", b"stopped: \x1b[2J a device's words")
    live = LiveState({"ready": 3}, True, 5_000_000, 1200, 80.5, 99.0, {"inbound": 2}, {"blocks": 4}, {"accepted": 6})
    with RunFollower(writer.folder) as follower, (tmp_path / "screen").open("w+") as screen:
        status = follower.poll()
        rates = _rates((1.0, live), (2.0, LiveState({}, True, 5_002_000, 1300, 1, 1, {}, {}, {})))
        console = Console(file=screen, width=140, force_terminal=True)
        console.print(_display(status, live, rates, 2))
        screen.seek(0)
        text = screen.read()
    assert rates == (2000.0, 100.0)
    assert "and 1 more devices" in text
    assert any(line.split()[:2] == ["device", "state"] for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())
    assert "2 kB/s in, 100 B/s out" in text
    assert "4 blocks" in text
    assert "\x1b[2J" not in text


# ---------------------------------------------------------------------- the server's own word


def test_the_note_of_who_serves(tmp_path: Path) -> None:
    assert live_url(tmp_path) == ""
    with noted(tmp_path, "http://127.0.0.1:9464"):
        assert live_url(tmp_path) == "http://127.0.0.1:9464"
    assert live_url(tmp_path) == ""
    for text in ("", "[]", "{}", "null"):
        (tmp_path / "live.json").write_text(text)
        assert live_url(tmp_path) == ""


def test_nobody_answers_there(tmp_path: Path) -> None:
    assert scrape("http://127.0.0.1:1") is None
    with pytest.raises(ConfigError, match="no address of metrics"):
        scrape("file:///etc/passwd")


def test_somebody_else_answers_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that speaks no HTTP, and no proxy is asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        assert scrape(f"http://127.0.0.1:{listener.getsockname()[1]}") is None
        thread.join(10)
        assert not thread.is_alive()  # it was asked
