"""The same federation with hypothesis in place of a seed: it chooses what happens next, and shortens what fails."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.protocol.exactly_once.invariants import check_state
from tests.protocol.exactly_once.nodes import Process
from tests.protocol.exactly_once.plans import plan_of
from tests.protocol.exactly_once.world import World

places = st.integers(0, 200)


class Federation(RuleBasedStateMachine):
    """One run; at the end everything is mended and the run has to finish."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World

    @initialize(number=st.integers(0, 10_000), calm=st.integers(0, 250))
    def begin(self, number: int, calm: int) -> None:
        """Some plan, and a place in its run."""
        self.world = World(plan_of(number), random.Random(number))
        self.world.storms = 1  # late boards may come at any time
        self.world.calm(calm)

    def _process(self, place: int) -> Process:
        return self.world.processes[place % len(self.world.processes)]

    def _is_open(self) -> bool:
        return not self.world.is_ending

    @rule(steps=st.integers(1, 60))
    def calm(self, steps: int) -> None:
        """Nothing goes wrong for a while; all that is left to do once the last update is made."""
        self.world.calm(steps)

    @precondition(_is_open)
    @rule(place=places, again=st.booleans())
    def deliver(self, place: int, again: bool) -> None:
        """A message comes, in any order, perhaps not for the last time."""
        if flights := self.world.network.flights:
            self.world.deliver(place % len(flights), again=again)

    @precondition(_is_open)
    @rule(place=places)
    def lose(self, place: int) -> None:
        """A message is lost."""
        if flights := self.world.network.flights:
            self.world.lose(place % len(flights))

    @precondition(_is_open)
    @rule(place=places)
    def work(self, place: int) -> None:
        """Something inside a process happens."""
        self.world.work(self._process(place))

    @precondition(_is_open)
    @rule(place=places)
    def tick(self, place: int) -> None:
        """Time passes for one process."""
        self.world.tick(self._process(place))

    @precondition(_is_open)
    @rule(place=places, before=st.none() | st.integers(0, 6))
    def crash(self, place: int, before: int | None) -> None:
        """A process dies, now or before one of its next commands."""
        self.world.crash(self._process(place), before)

    @precondition(_is_open)
    @rule(place=places)
    def come_back(self, place: int) -> None:
        """A process is there again."""
        self.world.start(self._process(place))
        self.world.connect(self._process(place))

    @precondition(_is_open)
    @rule(place=places)
    def cut(self, place: int) -> None:
        """A link breaks, for as long as nobody mends it."""
        self.world.cut(self._process(place))

    @precondition(_is_open)
    @rule(forgets=st.booleans())
    def restart_broker(self, forgets: bool) -> None:
        """The broker starts again, perhaps without what it had retained."""
        self.world.restart_broker(forgets=forgets)

    @precondition(_is_open)
    @rule(place=places, seconds=st.sampled_from([0.5, 10.0, 1e4, -1.0, -30.0]))
    def set_clock(self, place: int, seconds: float) -> None:
        """A clock jumps."""
        self.world.set_clock(self._process(place), seconds)

    @invariant()
    def nobody_has_other_weights(self) -> None:
        """See :func:`check_state`."""
        if hasattr(self, "world"):
            check_state(self.world)

    def teardown(self) -> None:
        """All is mended."""
        if hasattr(self, "world"):
            self.world.finish()


Federation.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
test_federation = Federation.TestCase
