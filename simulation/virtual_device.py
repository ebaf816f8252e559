"""The shell around one device's machine: what :mod:`fedzo.edge_runtime.agent` is on a board, without anything real."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ..protocol.device_side import device_events as machine
from ..protocol.device_side.device import Device
from ..protocol.device_side.parts import Parts
from ..protocol.errors import FedzoError
from ..protocol.perturbation.streams import Purpose, uint64s
from ..protocol.pruning.mask import Mask
from ..protocol.wire.documents import Hello, Presence
from ..protocol.wire.topics import Channel
from .boards import Board
from .clock import Clock
from .labour import Labour
from .settings import SimulationSettings
from .wires import Link, Wires

__all__ = ["VirtualDevice", "World"]

_SESSION = 1
_WORD = 2.0**-64


@dataclass(eq=False)
class World:
    """What all devices live in.

    Attributes:
        clock: Virtual time.
        wires: The broker.
        labour: Who computes.
        parts: What machines share.
        settings: Of the simulation.
        blobs: What every board holds from the start: the manifest's bytes; empty bytes for graphs.
        away_s: Longest time that a lost device stays away.
        dropouts: Times that a device was lost.
    """

    clock: Clock
    wires: Wires
    labour: Labour
    parts: Parts
    settings: SimulationSettings
    blobs: Mapping[bytes, bytes]
    away_s: float
    dropouts: int = 0


class VirtualDevice:
    """One device from joining to its end.

    Args:
        world: Where it lives.
        number: From 0; its data and its name.
        board: What it pretends to be.
        samples: Training samples that it holds.
        holdout: Samples that it holds out.

    Attributes:
        name: Its id; names sort like numbers.
        machine: Its state machine.
        online: Whether it has a link.
        is_away: Whether it had one and lost it.
        up: Its link to the server.
        down: Its link from the server.
        error: Why it left, if it was an error.
    """

    def __init__(self, world: World, number: int, board: Board, samples: int, holdout: int) -> None:
        settings = world.settings
        hello = Hello(_SESSION, board.profile, board.ram_budget_mib, samples, holdout, "simulated", "virtual")
        self._world, self._number, self._board = world, number, board
        self.name = f"device-{number:06d}"
        self.machine = Device(hello, retry_s=settings.retry_s, parts=world.parts)
        bytes_per_s = settings.bandwidth_kbit_s * 125.0
        self.up, self.down = Link(bytes_per_s, settings.latency_s), Link(bytes_per_s, settings.latency_s)
        self.online = self.is_away = False
        self.error: FedzoError | None = None
        self._mask: Mask | None = None
        self._held: dict[bytes, bytes] = {}
        self._computing: machine.Task | None = None
        self._is_back = False
        self._tick_at: float | None = None
        self._tries = (-1, 0)

    # --- the link ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """The link comes up, for the first time or again."""
        if self.online or self.machine.finished:
            return
        self.online, self.is_away = True, False
        self._is_back = self._computing is not None
        self.on(machine.Connected())
        self._world.wires.welcome(self)

    def receive(self, received: machine.Received) -> None:
        """A message arrives, unless the link broke meanwhile."""
        if not self.online:
            return
        self.on(received)
        if self._is_back and received.channel is Channel.HEAD:
            self._is_back = False
            if self._computing is not None:  # Its round is still open: what was lost with the link is computed anew.
                self._end(None)

    def _lose(self, task: machine.Task) -> None:
        """The board is gone in the middle of a task."""
        self._world.dropouts += 1
        self._computing, self.online, self.is_away = task, False, True
        self._world.wires.will(self, Presence(_SESSION, "lost"))
        self._world.clock.at(self._world.clock.now + self._world.away_s, self.connect)

    # --- events -----------------------------------------------------------------------------------------------------

    def on(self, event: machine.DeviceEvent) -> None:
        """Give an event to the machine, and carry out what it wants."""
        events, clock = deque([event]), self._world.clock
        while events:
            for command in self.machine.on(events.popleft(), clock.now):
                self._carry_out(command, events)
        wakeup = self.machine.wakeup
        if wakeup is not None and (self._tick_at is None or wakeup < self._tick_at):
            self._tick_at = wakeup
            clock.at(wakeup, self._tick, wakeup)

    def _tick(self, due: float) -> None:
        if self._tick_at != due:
            return  # another one came before it
        self._tick_at = None
        wakeup = self.machine.wakeup
        if wakeup is not None and wakeup <= due:
            self.on(machine.Tick())
        elif wakeup is not None:
            self._tick_at = wakeup
            self._world.clock.at(wakeup, self._tick, wakeup)

    def _carry_out(self, command: machine.DeviceCommand, events: deque[machine.DeviceEvent]) -> None:
        if isinstance(command, machine.Send):
            self._world.wires.to_server(self, command.channel, command.message)
        elif isinstance(command, (machine.FindBlob, machine.StoreBlob)):
            events.append(self._blob(command))
        elif isinstance(command, machine.Plan):
            board, run = self._board, command.run.run
            if board.refusal is not None:
                events.append(machine.Failed(board.refusal, run))
            else:
                events.append(machine.Planned(run, board.peak_mib, board.micro_batch))
        elif isinstance(command, machine.Prepare):
            self._mask = command.mask
            events.append(machine.Prepared(command.run.run, command.mask_sha256))
        elif isinstance(command, machine.Compute):
            self._compute(command.task, events)
        elif isinstance(command, machine.Cancel):
            if self._computing is not None and self.online:
                self._world.labour.forget(self._number, self._computing.round)
                number, self._computing = self._computing.number, None
                events.append(machine.Computed(number, None))
        elif isinstance(command, machine.GiveBack):
            self._world.labour.give_back(self._number, command.round)
        elif isinstance(command, machine.Finish):
            self.error = command.error

    def _blob(self, command: machine.FindBlob | machine.StoreBlob) -> machine.BlobFound:
        sha256 = command.sha256
        if isinstance(command, machine.StoreBlob):
            self._held[sha256] = command.data
        data = self._held.get(sha256, self._world.blobs.get(sha256))
        return machine.BlobFound(sha256, data is not None, data if data is not None and command.read else b"")

    # --- work -------------------------------------------------------------------------------------------------------

    def _compute(self, task: machine.Task, events: deque[machine.DeviceEvent]) -> None:
        if self._is_lost(task.round):
            self._lose(task)
            events.append(machine.Disconnected())
            return
        assert self._mask is not None
        self._computing = task
        self._world.labour.submit(self._number, self._board, task, self._mask, self._done)

    def _is_lost(self, round_: int) -> bool:
        settings = self._world.settings
        if not settings.dropout:
            return False
        self._tries = (round_, self._tries[1] + 1 if self._tries[0] == round_ else 0)
        word = uint64s(settings.seed, Purpose.CHANCE, 1 + round_, self._number, self._tries[1] + 1)[-1]
        return float(word) * _WORD < settings.dropout

    def _done(self, number: int, outcome: machine.Outcome) -> None:
        """The board is done with a task, which may not be wanted any more."""
        if self._computing is not None and self._computing.number == number:
            self._end(outcome)

    def _end(self, outcome: machine.Outcome | None) -> None:
        assert self._computing is not None
        number, self._computing = self._computing.number, None
        self.on(machine.Computed(number, outcome))
