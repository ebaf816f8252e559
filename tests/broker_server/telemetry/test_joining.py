"""What people are told while boards join."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import MemoryJournal
from fedzo.broker_server.server import Server
from fedzo.broker_server.telemetry import joining as joining_module
from fedzo.broker_server.telemetry.joining import IN_FULL, Joining
from fedzo.broker_server.telemetry.live_file import live_refusals, live_url, noted
from fedzo.edge_runtime.connection.transport import Arrived, Token
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Hello, Presence, Status
from tests.edge_runtime.conftest import write_artifact

Board = Callable[..., list[Arrived]]
TOO_SMALL = "the plan needs 57.1 MiB, the budget is 53 MiB"


def board(name: str, status: Status, detail: str = "", *, session: int = 1, run: str = "run-1") -> list[Arrived]:
    """A board's hello and its presence."""
    hello = Hello(session, "", 512.0, 8, 2, "", "x86_64").encode()
    state = Presence(session, status, run, detail, micro_batch=8).encode()
    return [Arrived(f"fedzo/v1/default/d/{name}/hello", hello, False, Token(1, 1)),
            Arrived(f"fedzo/v1/default/d/{name}/state", state, True, Token(1, 2))]  # fmt: skip


class Watched:
    """A server that is not connected, and what people hear of it."""

    def __init__(self, folder: Path, devices: int) -> None:
        write_artifact(folder / "artifact")
        run_folder = RunFolder.create(folder / "runs", folder / "artifact", name="run-1")
        run = run_folder.document(RunSettings(devices=devices, quorum=1))
        self.lines: list[str] = []
        self.kept: list[Mapping[str, str]] = []
        joining = Joining(self.lines.append, lambda text: self.lines.append(f"warning: {text}"))
        broker = ExternalBroker("mqtt://127.0.0.1:1")
        self.server = Server(run_folder, run, broker, MemoryJournal(), telemetry=joining)
        joining.attach(self.server.coordinator, self.kept.append)
        self._pool = ThreadPoolExecutor(1)

    def hear(self, *boards: list[Arrived]) -> None:
        self.server._carry_out([message for said in boards for message in said], self._pool)

    def close(self) -> None:
        self._pool.shutdown()
        self.server._transport.close(timeout_s=0.1)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[int], Watched]]:
    made: list[Watched] = []

    def start(devices: int) -> Watched:
        made.append(Watched(tmp_path, devices))
        return made[-1]

    yield start
    for watched in made:
        watched.close()


def test_each_board_that_gets_ready_or_takes_no_part_is_told_once(watch: Callable[[int], Watched]) -> None:
    watched = watch(3)
    for _ in range(2):
        watched.hear(board("board-1", "ready"))
        watched.hear(board("board-2", "refused", TOO_SMALL))
    watched.hear(board("board-3", "joining"), board("board-4", "refused", run="run-0"))
    assert watched.lines == ["board-1 is ready: 1 of 3", f"warning: board-2 takes no part: {TOO_SMALL}"]
    assert watched.kept == [{"board-2": TOO_SMALL}]
    watched.hear(board("board-2", "ready", session=2))  # It was given more memory.
    assert watched.lines[2:] == ["board-2 is ready: 2 of 3"]
    assert watched.kept[1:] == [{}]
    watched.hear(board("board-2", "refused", TOO_SMALL, session=1))
    assert len(watched.lines) == 3, "of an earlier process"


def test_a_board_that_is_gone_does_not_count(watch: Callable[[int], Watched]) -> None:
    watched = watch(3)
    watched.hear(board("board-1", "ready"), board("board-2", "ready"), board("board-1", "lost"))
    watched.hear(board("board-3", "ready"))
    assert watched.lines[-1] == "board-3 is ready: 2 of 3"


def test_nobody_is_told_of_boards_that_come_once_the_run_has_begun(watch: Callable[[int], Watched]) -> None:
    watched = watch(1)
    watched.hear(board("board-1", "ready"))
    assert watched.server.coordinator.head.round == 1
    watched.hear(board("board-2", "ready"), board("board-3", "refused", TOO_SMALL))
    assert watched.lines == ["board-1 is ready: 1 of 1", f"warning: board-3 takes no part: {TOO_SMALL}"]


def test_thousands_of_boards_make_a_few_lines(watch: Callable[[int], Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining_module, "PAUSE_S", 3600.0)
    watched = watch(5000)
    watched.hear(*(board(f"board-{number}", "ready") for number in range(1000)))
    watched.hear(*(board(f"small-{number}", "refused", TOO_SMALL) for number in range(1000)))
    assert len(watched.lines) <= 2 * IN_FULL + 1
    assert watched.lines[IN_FULL] == "11 of 5000 boards are ready"


def test_the_note_says_who_takes_no_part(tmp_path: Path) -> None:
    assert live_refusals(tmp_path) == {}
    with noted(tmp_path, "http://127.0.0.1:9464") as keep:
        assert live_refusals(tmp_path) == {}
        keep({"board-2": TOO_SMALL})
        assert live_refusals(tmp_path) == {"board-2": TOO_SMALL}
        assert live_url(tmp_path) == "http://127.0.0.1:9464"
        (tmp_path / "live.json").write_text(json.dumps({"refused": ["board-2"]}))
        assert live_refusals(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
