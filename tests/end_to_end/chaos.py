"""A federation of real processes in which a seeded schedule kills, freezes and cuts off whatever there is.

    python -m benchmarks.chaos --minutes 5 --seed 1

One episode is one run from its first round to its end. While it lasts, server, broker and boards get SIGKILL or are
stopped for a while, links vanish with and without a word, and the broker loses what it kept on its disk. Then
everything is put in order, and the run must end. What must hold:

- every report that a board got a receipt for is in the journal, once;
- no update was made of fewer reports than the quorum;
- server and boards end with the same weights, and with those that a replay of the journal alone gives;
- where the quorum is all boards, they are the weights of a run in which nothing happened. (All boards use portable
  graphs: one that was made for a processor is given up when it does not come in time, and rounds differently.)

The schedule follows from the seed, and is printed when something does not hold. What it meets does not: processes run
at their own pace.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedzo.broker_server.brokers.mosquitto import find_mosquitto
from fedzo.broker_server.history.replay import replay_run
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import Receipt, Report, ReportKind, Verdict
from tests.broker_fixtures import Proxy
from tests.end_to_end.fleet import Fleet, Process, agree, free_port, wait_for

__all__ = ["Chaos", "DiskBroker", "check_journal", "episode", "receipts", "undisturbed"]

MEAN_GAP_S = 1.5
LONGEST_S = 2.5
CALM_S = 150.0


class DiskBroker:
    """A mosquitto that keeps its state in a file, as one that is not ours does; it is started and killed by hand."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        program = find_mosquitto()
        assert program is not None, "mosquitto is not installed"
        self.host, self.port = host, free_port()
        self._prefix = prefix
        self._state = folder / "mosquitto"
        self._state.mkdir()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} {host}\nallow_anonymous true\nset_tcp_nodelay true\n"
            f"persistence true\npersistence_location {self._state}/\nautosave_interval 1\nautosave_on_changes true\n"
            "max_inflight_messages 500\nmax_queued_messages 10000\n" + ("user root\n" if os.geteuid() == 0 else "")
        )
        self._log = (folder / "mosquitto.log").open("ab")
        self._command = [*prefix, program, "-c", str(self._config)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    @property
    def has_state(self) -> bool:
        return (self._state / "mosquitto.db").exists()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, start_new_session=True)
        wait_for(self._listens, "mosquitto to listen", 20.0)

    def kill(self, *, lose_disk: bool = False) -> None:
        """kill -9; with ``lose_disk`` it forgets all sessions, queues and retained messages."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if lose_disk:
            for path in self._state.iterdir():
                path.unlink()

    def close(self) -> None:
        self.kill()
        self._log.close()

    def _listens(self) -> bool:
        if self._prefix:  # It cannot be reached from here.
            look = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
            command = [*self._prefix, sys.executable, "-c", look, self.host, str(self.port)]
            return subprocess.run(command, capture_output=True).returncode == 0
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1.0):
            return True
        return False


class Chaos:
    """Disturbs one fleet for a while.

    Args:
        fleet: Its server is running, its boards too.
        server: The server's process; see ``server`` for the one that runs later.
        broker: Between all of them.
        server_link: The relay that the server reaches the broker by.
        links: The relay of each board.
        seed: Of the schedule.
    """

    def __init__(
        self,
        fleet: Fleet,
        server: Process,
        broker: DiskBroker,
        server_link: Proxy,
        links: list[Proxy],
        start_board: Callable[[int], Process],
        seed: object,
    ) -> None:
        self.fleet, self.server, self.broker, self.links, self.server_link = fleet, server, broker, links, server_link
        self._start_board = start_board
        self._random = random.Random(str(seed))
        self.schedule: list[str] = []
        self.counts: Counter[str] = Counter()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # what puts things in order again
        self._order = itertools.count()
        self._busy: set[object] = set()
        self._began = time.monotonic()

    def run(self, seconds: float, is_over: Callable[[], bool]) -> None:
        """Disturb until the time is over or something is true, then put everything in order."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not is_over():
            self._disturb()
            pause = min(self._random.expovariate(1 / MEAN_GAP_S), LONGEST_S)
            self._mend_until(time.monotonic() + pause)
            self._look()
        self._mend_until(None)
        self._look()
        self._gather()

    def _gather(self) -> None:
        """The server goes on when all boards have a link: a run may end without one that it believes to be lost."""
        if self.server.running:
            self.server.signal(signal.SIGSTOP)
            wait_for(self._all_linked, "all boards to have a link", logs=self.fleet.logs)
            self.server.signal(signal.SIGCONT)

    def _all_linked(self) -> bool:
        pairs = zip(self.fleet.boards, self.links, strict=True)
        return all(not board.running or ("connected" in board.stderr and link.is_linked) for board, link in pairs)

    def _look(self) -> None:
        """Nobody may end by itself with an error."""
        for process in (self.server, *self.fleet.boards):
            if not process.running:
                assert process.wait() in (0, -signal.SIGKILL), f"{process.name}: {process.stdout}{process.stderr}"

    def _mend_until(self, until: float | None) -> None:
        while self._later and (until is None or self._later[0][0] <= until):
            at, _, mend = heapq.heappop(self._later)
            time.sleep(max(0.0, at - time.monotonic()))
            mend()
        if until is not None:
            time.sleep(max(0.0, until - time.monotonic()))

    def _disturb(self) -> None:
        boards = range(len(self.links))
        what = self._random.choices(
            ("kill server", "kill broker", "wipe broker", "kill board", "stop board", "stop server", "partition board",
             "partition server", "cut all"),
            (3, 3, 2, 5, 2, 1, 4, 2, 2),
        )[0]  # fmt: skip
        number, seconds = self._random.choice(boards), round(self._random.uniform(0.05, LONGEST_S), 2)
        silent = self._random.random() < 0.5
        target: object = number if "board" in what else what.split()[1]
        if target in self._busy or not self._apply(what, number, silent):
            return
        self.counts[what] += 1
        name = f"{what} {number}" if "board" in what else what
        kind = (" silently" if silent else " with a word") if "partition" in what else ""
        self.schedule.append(f"{time.monotonic() - self._began:7.2f} s  {name}{kind}, for {seconds:g} s")
        self._busy.add(target)

        def mend() -> None:
            self._mend(what, number)
            self._busy.discard(target)

        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), mend))

    def _apply(self, what: str, number: int, silent: bool) -> bool:
        """Do it; False if there is nothing to do it to."""
        if what in ("kill server", "stop server"):
            if not self.server.running:
                return False
            self.server.kill() if what == "kill server" else self.server.signal(signal.SIGSTOP)
        elif what in ("kill broker", "wipe broker"):
            self.broker.kill(lose_disk=what == "wipe broker")
        elif what in ("kill board", "stop board"):
            board = self.fleet.boards[number]
            if not board.running:
                return False
            board.kill() if what == "kill board" else board.signal(signal.SIGSTOP)
        elif what == "cut all":
            for link in (self.server_link, *self.links):
                link.cut()
        else:
            self._partition(self.server_link if what == "partition server" else self.links[number], silent, True)
        return True

    def _mend(self, what: str, number: int) -> None:
        if what == "kill server":
            self.server = self.fleet.resume(rig="hasty")
        elif what == "stop server":
            self.server.signal(signal.SIGCONT)
        elif what in ("kill broker", "wipe broker"):
            self.broker.start()
        elif what == "kill board":
            self.fleet.boards[number] = self._start_board(number)
        elif what == "stop board":
            self.fleet.boards[number].signal(signal.SIGCONT)
        elif what.startswith("partition"):
            self._partition(self.server_link if what == "partition server" else self.links[number], False, False)

    @staticmethod
    def _partition(link: Proxy, silent: bool, on: bool) -> None:
        """Packets vanish (``silent``), or connections break and new ones are refused."""
        link.frozen, link.refusing = on and silent, on and not silent
        if on and not silent:
            link.cut()


def receipts(path: Path) -> list[Receipt]:
    """What a board has noted with the rig ``receipts``."""
    if not path.exists():
        return []
    found = [decode(bytes.fromhex(line)) for line in path.read_text().splitlines()]
    return [receipt for receipt in found if isinstance(receipt, Receipt)]


def check_journal(fleet: Fleet, names: list[str], quorum: int, noted: Callable[[str], Path]) -> int:
    """Compare receipts and updates with the journal, and return how many receipts there were."""
    entries = fleet.entries("report")
    reports = Counter((entry.device, entry.round) for entry in entries)
    assert all(count == 1 for count in reports.values()), "a report is in the journal twice"
    total = 0
    for name in names:
        for receipt in receipts(noted(name)):
            if receipt.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
                assert (name, receipt.round) in reports, (
                    f"{name} has a receipt for round {receipt.round}, which is lost"
                )
                total += 1
    probes: Counter[int] = Counter()
    for entry in entries:
        report = decode(entry.payload)
        if isinstance(report, Report) and report.kind is ReportKind.PROBE and not report.decline:
            probes[entry.round] += 1
    for update in fleet.entries("update"):
        assert probes[update.round] >= quorum, f"round {update.round} closed with {probes[update.round]} reports"
    return total


def episode(
    make_fleet: Callable[..., Fleet],
    folder: Path,
    *,
    boards: int,
    quorum: int,
    rounds: int,
    seconds: float,
    seed: object,
    expected: str | None,
) -> dict[str, Any]:
    """Run one federation under disturbance to its end, and check it.

    Args:
        make_fleet: ``make_fleet(boards, url=...)``.
        folder: For broker and receipts.
        boards: How many.
        quorum: Reports that close a round.
        rounds: Of training.
        seconds: How long to disturb at most; it ends earlier when four fifths of the updates are made.
        seed: Of the schedule.
        expected: Digest that the weights must have, if it is known.

    Raises:
        AssertionError: Something does not hold; the message has the schedule.
    """
    broker = DiskBroker(folder)
    broker.start()
    links = [Proxy(("127.0.0.1", broker.port)) for _ in range(boards + 1)]
    server_link, board_links = links[-1], links[:-1]
    fleet = make_fleet(boards, url=server_link.url)
    names = [f"board-{number}" for number in range(boards)]

    def noted(name: str) -> Path:
        return folder / f"{name}.receipts"

    def start_board(number: int) -> Process:
        fleet.url = board_links[number].url
        return fleet.device(number, rig="receipts", RIG_RECEIPTS=str(noted(names[number])))

    server = fleet.serve(*serve_options(rounds, boards, quorum), rig="hasty")
    fleet.boards = [start_board(number) for number in range(boards)]
    chaos = Chaos(fleet, server, broker, server_link, board_links, start_board, seed)
    began = time.monotonic()
    try:
        fleet.await_entries("enrolment", 1)
        chaos.run(seconds, lambda: len(fleet.entries("update")) >= 0.8 * rounds)
        while_disturbed = len(fleet.entries("update"))
        answer = chaos.server.answer(CALM_S)
        answers = [board.answer(CALM_S) for board in fleet.boards]
        digest = agree(answer, answers)
        _, coordinator = replay_run(fleet.path)
        assert coordinator.replica.digest.hex() == digest, "a replay of the journal gives other weights"
        if expected is not None:
            assert digest == expected, f"{digest} instead of the undisturbed run's {expected}"
        total = check_journal(fleet, names, quorum, noted)
        assert total > 0
    except BaseException as error:
        lines = "\n".join(chaos.schedule)
        logs = fleet.folder
        message = f"{type(error).__name__}: {error}\nseed {seed}, quorum {quorum} of {boards}, logs in {logs}"
        raise AssertionError(f"what was done:\n{lines}\n{message}") from error
    finally:
        fleet.close()
        broker.close()
        for link in links:
            link.close()
    return {
        "digest": digest,
        "seconds": round(time.monotonic() - began, 1),
        "updates": answer["rounds"],
        "updates_while_disturbed": while_disturbed,
        "receipts": total,
        "disturbances": dict(chaos.counts),
    }


def serve_options(rounds: int, boards: int, quorum: int) -> tuple[object, ...]:
    """Settings of an episode's run."""
    return ("--rounds", rounds, "--devices", boards, "--quorum", quorum, "--evaluate-every", 25, "--deadline", 20)


def undisturbed(make_fleet: Callable[..., Fleet], boards: int, rounds: int) -> str:
    """Digest of a run in which nothing happens."""
    fleet = make_fleet(boards)
    try:
        server, devices = fleet.serve(*serve_options(rounds, boards, boards)), fleet.devices(rig="portable")
        return agree(server.answer(), [device.answer() for device in devices])
    finally:
        fleet.close()
