"""A server whose journal is an older copy, or was begun again, while its boards live on and know of later rounds."""

from __future__ import annotations

import functools

import pytest

from fedzo.protocol.server_side.coordinator import SKIPPED_ROUNDS
from fedzo.protocol.wire.documents import Announcement, parse
from tests.protocol.simulation.desk import Desk
from tests.protocol.simulation.nodes import Entry
from tests.protocol.simulation.world import World, check_end
from tests.protocol.test_faults import settings_of

SEEDS = (1, 2, 4, 7)


@functools.lru_cache
def entries(seed: int) -> int:
    """Of the journal when it is lost."""
    return len(_until_half(seed).server.journal)


def _until_half(seed: int) -> World:
    world = World(settings_of(seed), 4, seed=seed).start()
    world.run(lambda: world.server.alive and world.server.coordinator.replica.index >= 7)
    return world


def _restored(world: World, journal: list[Entry]) -> World:
    """The server starts again with another journal; the boards have noticed nothing but a lost server."""
    world.server.crash()
    world.server.journal = journal
    for node in world.devices.values():
        node.may_start_over = True
    world.server.start()
    return world


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7, 0.9, 0.95, 0.98])
def test_a_run_goes_on_from_an_older_copy(seed: int, share: float) -> None:
    """At any place: in the middle of a round, before the mask, before the enrolments, from nothing."""
    world = _until_half(seed)
    _restored(world, world.server.journal[: round(share * entries(seed))]).finish(limit_s=2_000)
    check_end(world)


@pytest.mark.parametrize("lost", range(1, 13))
def test_a_copy_that_lacks_the_last_entries(lost: int) -> None:
    """Receipts of an open round may be lost with it: the boards do not answer that round a second time."""
    world = _until_half(2)
    _restored(world, world.server.journal[:-lost]).finish(limit_s=2_000)
    check_end(world)


def test_a_board_that_enrolled_after_the_copy_says_hello_again() -> None:
    world = World(settings_of(2), 4, seed=2)
    world.server.start()
    *first, last = world.devices.values()
    for node in first:
        node.start()
    world.run(lambda: world.server.coordinator.replica.index >= 3)
    copy = list(world.server.journal)
    last.start()
    world.run(lambda: world.server.coordinator.replica.index >= 6)
    assert last.name in world.server.coordinator.roster.members
    _restored(world, copy)
    assert last.name not in world.server.coordinator.roster.members
    world.finish(limit_s=2_000)
    check_end(world)
    assert last.name in world.server.coordinator.roster.members


def test_devices_can_make_a_server_skip_rounds_once() -> None:
    """A device may say anything: it costs the open round, and no second one."""
    desk = Desk().connect().join("a", "b", "c", "d")
    before = desk.head.round
    assert desk.head.phase == "train"
    for _ in range(3):
        desk.presence("a", round=desk.head.round + 5)
    assert desk.head.round == before + SKIPPED_ROUNDS
    heads = [parse(Announcement, payload).round for kind, _, _, payload in desk.journal if kind == "announce"]
    assert heads == [before, before + SKIPPED_ROUNDS]
