"""Runs a fedzo program that is rigged, mostly to kill itself at a named point: RIG server|device ARGUMENT...

=====================  =======================================================================
rig                    what happens
=====================  =======================================================================
``before:KIND:N``      the server dies before the Nth entry of a kind is committed
``after:KIND:N``       right after, before anything is sent or acknowledged
``sent:CHANNEL:N``     with the Nth message of a channel handed to the broker
``stop:PLACE:SIGNAL``  the server gets a signal as it starts: in ``data``, ``broker`` or ``folder``
``last-broker``        the server does not start a broker again that died
``impatient``          the server gives a broker by URL one second to answer
``computing:N``        the device dies at the beginning of its Nth probe
``saved:N``            with its Nth report in the outbox and not sent
``received:N``         with the Nth receipt, the report still in the outbox
``arena:BYTES``        the device gets a smaller arena for its tensors than it has planned
``scores:FACTOR``      the device reports saliency scores that are off by this factor
``portable``           the device finds no graph that was made for its processor
``hasty``              either tries a lost link again after a second at most
``receipts``           the device is hasty and portable, and notes every receipt in ``RIG_RECEIPTS``
=====================  =======================================================================

SIGKILL leaves no handler, no ``finally`` and no flush; what is in the kernel stays.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

FLUSH_S = 0.1  # enough for the network thread to write to a socket on this machine


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """True at the Nth call, once."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self, count: int = 1) -> bool:
        before = self._left
        self._left -= count
        return before > 0 >= self._left


def wrap(
    owner: type | ModuleType, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None
) -> None:
    """Call something around a method, with the method's arguments."""
    method = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if before is not None:
            before(*arguments, **keywords)
        result = method(*arguments, **keywords)
        if after is not None:
            after(*arguments, **keywords)
        return result

    setattr(owner, name, wrapped)


def replace(module: ModuleType, name: str, value: object) -> None:
    """Give a module another thing under a name that it imported."""
    assert hasattr(module, name)
    setattr(module, name, value)


def be_hasty() -> None:
    from fedzo.edge_runtime.connection import retry

    retry._CAP_S = 1.0


def note_receipts(path: str) -> None:
    """Every receipt that reaches the device, before anything follows from it."""
    from fedzo.protocol.device_side.delivery import Delivery

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(_: object, receipt: Any) -> None:
        os.write(file, receipt.encode().hex().encode() + b"\n")

    wrap(Delivery, "take", note, None)


def be_portable() -> None:
    from fedzo.edge_runtime.planning import run_plan

    replace(run_plan, "wanted_variants", lambda *_: ())


def capped_engine(kind: Any, cap: int, *arguments: Any, arena_bytes: int, **settings: Any) -> Any:
    """An engine with less memory than was planned."""
    return kind(*arguments, arena_bytes=min(cap, arena_bytes), **settings)


def stop_at(place: str, name: str) -> None:
    """The first time that the server comes there."""
    from fedzo.broker_server.brokers.child import ChildBroker
    from fedzo.broker_server.history import run_folder
    from fedzo.cli import serve_run

    places: dict[str, tuple[type | ModuleType, str]] = {
        "data": (serve_run, "load_dataset"),
        "broker": (ChildBroker, "_supervise"),  # on a thread of its own, so that the program is about to start
        "folder": (run_folder, "_flush"),
    }
    owner, method = places[place]
    first = Countdown(1)

    def stop(*_: object, **__: object) -> None:
        if first():
            os.kill(os.getpid(), getattr(signal, name))

    wrap(owner, method, stop, None)


def rig_server(rig: str) -> None:
    from fedzo.broker_server.brokers import child, external
    from fedzo.broker_server.journal import Entry, SqliteJournal
    from fedzo.edge_runtime.connection.transport import MqttTransport

    if rig == "hasty":
        be_hasty()
        return
    if rig == "last-broker":
        child._MOST_CRASHES = 1
        return
    if rig == "impatient":
        external._TIMEOUT_S = 1.0
        return
    if rig.startswith("stop:"):
        stop_at(*rig.split(":")[1:])
        return
    from fedzo.protocol.server_side import snapshots

    replace(snapshots, "MOST_UPDATES", 1)  # so that the next server begins from a snapshot
    when, what, number = rig.split(":")
    reached = Countdown(int(number))

    def on_append(_: object, entries: Sequence[Entry]) -> None:
        if reached(sum(entry.kind == what for entry in entries)):
            die()

    def on_publish(_: object, topic: str, *__: object, **___: object) -> None:
        if topic.endswith(f"/{what}") and reached():
            time.sleep(FLUSH_S)  # of the server's own thread; nothing else follows
            die()

    if when == "sent":
        wrap(MqttTransport, "publish", None, on_publish)
    else:
        wrap(SqliteJournal, "append", on_append if when == "before" else None, on_append if when == "after" else None)


def rig_device(rig: str) -> None:
    from fedzo.edge_runtime import worker
    from fedzo.edge_runtime.estimation.estimators import SteinEstimator
    from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
    from fedzo.edge_runtime.inference.engine import Engine
    from fedzo.edge_runtime.storage.outbox import Outbox
    from fedzo.edge_runtime.storage.residual_file import ResidualFile

    if rig == "hasty":
        be_hasty()
        return
    if rig == "receipts":
        be_hasty()
        be_portable()
        note_receipts(os.environ["RIG_RECEIPTS"])
        return
    if rig == "portable":
        be_portable()
        return
    when, number = rig.split(":")
    if when == "scores":
        exact = UnitShiftScorer.score

        def score(*arguments: Any, **keywords: Any) -> Any:
            found = exact(*arguments, **keywords)
            return dataclasses.replace(found, sensitivities=found.sensitivities * np.float32(number))

        UnitShiftScorer.score = score  # type: ignore[method-assign]
        return
    if when == "arena":
        replace(worker, "Engine", partial(capped_engine, Engine, int(number)))
        return
    reached = Countdown(int(number))

    def count(*_: object, **__: object) -> None:
        if reached():
            die()

    if when == "computing":
        wrap(SteinEstimator, "measure", count, None)
    elif when == "residual":
        wrap(ResidualFile, "save", None, count)
    elif when == "saved":
        wrap(Outbox, "save", None, count)
    else:
        wrap(Outbox, "drop", count, None)


def main() -> int:
    rig, role, *arguments = sys.argv[1:]
    if role == "server":
        from fedzo.cli.main import main as server

        rig_server(rig)
        return server(arguments)
    from fedzo.edge_runtime.__main__ import main as device

    rig_device(rig)
    return device(arguments)


if __name__ == "__main__":
    sys.exit(main())
