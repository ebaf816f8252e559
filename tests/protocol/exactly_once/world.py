"""A federation whose course is a row of choices: what happens next, and what goes wrong.

:class:`World` has a method for each thing that can happen. :func:`play` draws them from a seed: storms, in which
anything happens at any time, and calms, in which everybody is there, messages come in order and time passes only when
nothing else is left to do. In the last calm the run has to finish, in bounded time and in a bounded number of steps.
"""

from __future__ import annotations

import random

from tests.protocol.exactly_once.invariants import check_end, check_state
from tests.protocol.exactly_once.ledger import Ledger
from tests.protocol.exactly_once.network import Network
from tests.protocol.exactly_once.nodes import DeviceNode, Process, ServerNode
from tests.protocol.exactly_once.plans import Plan, plan_of

__all__ = ["World", "play"]

CALM_S = 2_000.0
CALM_STEPS = 8_000
RESUMES = 5


class World:
    """One server and some devices.

    Args:
        plan: What it is about.
        source: Of everything that happens by chance.
        verbose: Whether to print every step.

    Attributes:
        steps: What has happened so far, counted.
        storms: Of which so many storms.
        ledger: What the journal says in the end.
    """

    def __init__(self, plan: Plan, source: random.Random, *, verbose: bool = False) -> None:
        self.plan = plan
        self.random = source
        self.network = Network(source)
        self.server = ServerNode(self.network, plan)
        self.devices = [
            DeviceNode(self.network, f"dev-{i}", board, plan, self.server) for i, board in enumerate(plan.boards)
        ]
        self.processes: list[Process] = [self.server, *self.devices]
        self.network.clients = list(self.processes)
        self.steps = self.storms = 0
        self.ledger: Ledger
        self._verbose = verbose

    # --- what can happen ------------------------------------------------------------------------------------------

    def start(self, process: Process) -> None:
        """Start a process that does not run, with a clock that shows anything."""
        comes_late = isinstance(process, DeviceNode) and process.board.comes_late and self.storms == 0
        if not process.alive and not comes_late:
            process.clock = self.random.choice([0.0, 50.0, 1e6])
            process.start()
            self._say("start", process.name)

    def connect(self, process: Process) -> None:
        """Give a running process a link."""
        if process.alive and not process.online and not process.left:
            self._say("connect", process.name)
            self.network.connect(process)

    def crash(self, process: Process, before: int | None = None) -> None:
        """Kill a process, now or before a command that it will carry out."""
        if process.alive and not process.left:
            self._say("crash", process.name, before)
            if before is None:
                process.crash()
            else:
                process.crash_before = before

    def cut(self, process: Process) -> None:
        """Break its link."""
        self._say("cut", process.name)
        self.network.disconnect(process)

    def restart_broker(self, *, forgets: bool) -> None:
        """Restart the broker."""
        self._say("broker", "forgets" if forgets else "remembers")
        self.network.restart_broker(forgets=forgets)

    def set_clock(self, process: Process, seconds: float) -> None:
        """Let a clock jump, forward or backward."""
        self._say("clock", process.name, seconds)
        process.clock += seconds

    def tick(self, process: Process) -> bool:
        """Let time pass for a process until it wakes up."""
        wakeup = process.wakeup if process.alive and not process.left else None
        if wakeup is None:
            return False
        self._say("tick", process.name, wakeup)
        process.clock = max(process.clock, wakeup)
        process.tick()
        if process.alive and not process.left and (after := process.wakeup) is not None:
            assert after > process.clock, f"{process.name} wants to wake up at {after}, it is {process.clock}"
        return True

    def work(self, process: Process) -> None:
        """Let the oldest thing inside a process happen."""
        if process.local:
            process.local.popleft()()

    def deliver(self, index: int, *, again: bool = False) -> None:
        """Let a message take its next way."""
        if self._verbose:
            flight = self.network.flights[index]
            ways = "up" if flight.up else f"down to {flight.client.name if flight.client else ''}"
            self._say("deliver", ways, flight.channel.name, flight.device, str(flight.message)[:100], again or "")
        self.network.deliver(index, again=again)

    def lose(self, index: int) -> None:
        """Lose a message."""
        if self._verbose:
            flight = self.network.flights[index]
            self._say("lose", flight.up, flight.channel.name, flight.device, str(flight.message)[:100])
        self.network.lose(index)

    def _say(self, *words: object) -> None:
        if self._verbose:
            print(self.steps, *words)  # noqa: T201 (asked for)

    def node(self, name: str) -> DeviceNode:
        """The device with that name."""
        return self.devices[int(name.rpartition("-")[2])]

    # --- what is the case -----------------------------------------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        """Whether the last update is made: who is away when the run ends stays behind."""
        replica = self.server.machine.replica
        return replica.index >= self.plan.settings.training.rounds

    @property
    def is_over(self) -> bool:
        """Whether the run is done, and everybody has left whom the server counted on when it announced the end."""
        server = self.server
        is_done = server.alive and server.left and server.error is None
        return is_done and all(node.left or node.name not in server.finalists for node in self.devices)

    def describe(self) -> str:
        """Where everybody is."""
        head = self.server.machine.head
        stages = {node.name: (node.machine.stage, node.session) for node in self.devices}
        return f"plan {self.plan.number}, step {self.steps}: {head.phase} round {head.round}, {stages}"

    # --- the calm -------------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Everybody runs and has a link; a run that was stopped is resumed."""
        if self.server.alive and self.server.left and self.server.error is not None:
            self.server.crash()
        for process in self.processes:
            process.crash_before = None
            self.start(process)
            self.connect(process)

    def calm(self, steps: int) -> None:
        """Nothing goes wrong for some steps."""
        self.mend()
        for _ in range(steps):
            if self.is_ending:
                return
            self.steps += 1
            self._calm_step()
            if self.server.left:
                self.mend()

    def finish(self) -> None:
        """Nothing goes wrong any more, but for faults that are over at once: the run ends, and all is well."""
        self.storms += 1  # Everybody is there now.
        self.mend()
        end, passed, resumes, late = self.steps + CALM_STEPS, 0.0, 0, self.plan.weather.late_faults
        while not self.is_over:
            self.steps += 1
            assert self.steps < end, f"too many steps: {self.describe()}"
            if self.server.left and self.server.error is not None:
                resumes += 1
                assert resumes <= RESUMES, f"it stops again and again: {self.server.error}: {self.describe()}"
                self.mend()
            elif late and self.random.random() < 0.03:
                late -= 1
                self._late_fault()
            else:
                passed += self._calm_step()
                assert passed <= CALM_S, f"too slow: {self.describe()}"
        self.ledger = check_end(self)

    def _calm_step(self) -> float:
        """The oldest thing happens; only when there is none does time pass. Gives the seconds that passed."""
        busy = [process for process in self.processes if process.local]
        if self.network.flights and not (busy and self.random.random() < 0.3):
            self.deliver(0)
        elif busy:
            self.work(self.random.choice(busy))
        else:
            return self._pass_time()
        return 0.0

    def _late_fault(self) -> None:
        source = self.random
        process = source.choice(self.processes)
        kind = source.randrange(5)
        if process.left:
            return
        if kind == 0:
            self.crash(process)
        elif kind == 1:
            self.cut(process)
        elif kind == 2 and self.network.flights:
            self.deliver(source.randrange(len(self.network.flights)), again=True)
        elif kind == 3 and self.network.flights:
            self.deliver(source.randrange(len(self.network.flights)))
        elif kind == 4:
            self.restart_broker(forgets=source.random() < 0.5)
        self.mend()

    def _pass_time(self) -> float:
        waits = [
            (process.wakeup - process.clock, number)
            for number, process in enumerate(self.processes)
            if process.alive and not process.left and process.wakeup is not None
        ]
        assert waits, f"nothing is left to happen: {self.describe()}"
        wait, number = min(waits)
        wait = max(0.0, wait)
        for process in self.processes:
            process.clock += wait
        self.tick(self.processes[number])
        return wait

    # --- the storm ------------------------------------------------------------------------------------------------

    def storm(self, steps: int) -> None:
        """Anything happens at any time."""
        weather, source = self.plan.weather, self.random
        chance = source.random
        for _ in range(steps):
            if self.is_ending:
                break
            self.steps += 1
            draw = chance()
            if draw < weather.fault:
                self._fault()
                continue
            if draw < weather.fault + weather.tick:
                # Seldom the server: its deadlines are long, and a run that only waits for devices is soon stopped.
                self.tick(self.server if chance() < 0.1 else source.choice(self.devices))
                continue
            flights = self.network.flights
            process = source.choice(self.processes)
            if process.local and chance() < 0.5:
                self.work(process)
            elif flights:
                index = source.randrange(len(flights)) if chance() < weather.reorder else 0
                draw = chance()
                if draw < weather.drop:
                    self.lose(index)
                else:
                    self.deliver(index, again=draw < weather.drop + weather.duplicate)
            elif process.local:
                self.work(process)
            elif not self.tick(process):
                self.start(process)
                self.connect(process)
        self.storms += 1

    def _fault(self) -> None:
        source = self.random
        process = source.choice(self.processes)
        kind = source.randrange(10)
        if kind <= 1:
            self.crash(process)
        elif kind <= 3:
            self.crash(process, source.randrange(8))
        elif kind == 4:
            self.crash(self.server, source.randrange(4))
        elif kind <= 6:
            self.cut(process)
        elif kind == 7:
            self.restart_broker(forgets=source.random() < 0.5)
        elif kind == 8:
            self.set_clock(process, source.choice([0.5, 10.0, 1e4, -1.0, -30.0]))
        elif self.server.left and self.server.error is not None:
            self.server.crash()
        else:
            self.start(process)
            self.connect(process)
        check_state(self)


def play(number: int, *, verbose: bool = False) -> World:
    """One schedule, to its end; a function of its number."""
    world = World(plan_of(number), random.Random(f"schedule {number}"), verbose=verbose)
    for calm, storm in world.plan.weather.course:
        if calm:
            world.calm(calm)
        world.storm(storm)
    world.finish()
    return world
