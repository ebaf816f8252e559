"""A server that dies anywhere goes on where its journal ends, to the same weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from fedzo.protocol.errors import ProtocolError, QuorumError
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.server_side.coordinator_events import Finish, OfferBlob
from fedzo.protocol.settings import LOCAL_ESTIMATORS, Assignment, EstimatorName, RunSettings, SaliencySettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, Hello, parse
from fedzo.protocol.wire.messages import UpdateRecord, Verdict
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import FakeEngine
from tests.protocol.simulation.nodes import Entry
from tests.protocol.simulation.world import World, check_end

ESTIMATORS: tuple[EstimatorName, ...] = tuple(name for name in get_args(EstimatorName) if name not in LOCAL_ESTIMATORS)
SPARSE = change(SETTINGS, sparsity=0.5, saliency=SaliencySettings(steps=2, samples=8), evaluate_every=2)


def outcome(desk: Desk) -> tuple[Any, ...]:
    """What must not depend on how often the server was started."""
    machine = desk.machine
    average, test = machine.replica.evaluated()[1], machine.range_test
    rate = test.rate() if test is not None else None
    return machine.replica.digest, machine.replica.head, machine.mask, machine.evaluations, desk.phases(), average, rate


ADAPTED = {
    "k_max": 8,
    "adapt_sigma": True,
    "rounds": 6,
    "warmup": 2,
    "schedule": "step",
    "optimiser": OptimiserConfig("adam", ema=0.75, front_rate=0.5),
}
VARIANTS: dict[str, dict[str, Any]] = {name: {"estimator": name} for name in ESTIMATORS}
VARIANTS |= {f"adapted {assignment}": {"assignment": assignment, **ADAPTED} for assignment in get_args(Assignment)}
VARIANTS["adapted node"] = {"estimator": "node", **ADAPTED}
VARIANTS["range test"] = {"schedule": "range", "rounds": 30, "learning_rate": 10.0, "final_rate": 1e-4}


@functools.cache
def undisturbed(variant: str = "stein") -> Desk:
    return Desk(change(SPARSE, **VARIANTS[variant])).connect().join().play()


@pytest.mark.parametrize(
    ("variant", "cut"), [(name, cut) for name in VARIANTS for cut in range(len(undisturbed(name).journal))]
)
def test_any_beginning_of_the_journal_leads_to_the_same_end(variant: str, cut: int) -> None:
    """The entries after the cut are lost; the devices report the same again."""
    expected = undisturbed(variant)
    desk = Desk(expected.settings, journal=expected.journal[:cut])
    desk.connect().join().play()
    assert outcome(desk) == outcome(expected)
    # Which devices have ended is recorded again when they say so again.
    assert [kind for kind in desk.kinds() if kind != "phase"] == [kind for kind in expected.kinds() if kind != "phase"]
    check_order(desk.trace, expected.journal[:cut])


@pytest.mark.parametrize("assignment", get_args(Assignment))
def test_an_adapted_run_announces_what_it_has_learned(assignment: Assignment) -> None:
    """Else the restarts above would say nothing about it."""
    desk = undisturbed(f"adapted {assignment}")
    heads = [parse(Announcement, payload) for kind, _, _, payload in desk.journal if kind == "announce"]
    trained = [head for head in heads if head.phase == "train"]
    least, sigma = desk.settings.training.k, desk.settings.training.sigma
    assert (trained[0].k, trained[0].sigma) == (0, 0.0)
    assert any(least < head.k <= 8 for head in trained)
    assert len({head.sigma or sigma for head in trained}) > 1
    records = [decode(payload) for kind, _, _, payload in desk.journal if kind == "update"]
    slots = 1 if assignment == "shared" else len(desk.machine.roster.members)
    counts = [record.coefficients.size for record in records if isinstance(record, UpdateRecord)]
    assert counts == [slots * (head.k or least) for head in trained]
    assert {found["weights"] for found in desk.machine.evaluations} == {"average"}


@pytest.mark.parametrize("cut", range(1, len(undisturbed().journal), 5))
def test_restarts_one_after_another_lead_to_the_same_end(cut: int) -> None:
    """Every life gets only a few entries further."""
    journal: list[Entry] = []
    for _ in range(100):
        desk = Desk(SPARSE, journal=journal)
        if desk.machine.finished:
            break
        desk.connect().join().play()
        journal = desk.journal[: len(journal) + cut]
    assert outcome(Desk(SPARSE, journal=journal)) == outcome(undisturbed())


def test_what_is_done_stays_done() -> None:
    desk = Desk(SPARSE, journal=undisturbed().journal)
    assert desk.machine.finished
    assert desk.connect().out == []


def test_masks_are_offered_again() -> None:
    masks = [payload for kind, _, _, payload in undisturbed().journal if kind == "mask"]
    desk = Desk(SPARSE, journal=undisturbed().journal)
    assert [c.data for c in desk.trace if isinstance(c, OfferBlob)] == masks


def test_an_open_round_goes_on() -> None:
    desk = Desk().connect().join()
    desk.report("a", "b")
    again = Desk(journal=desk.journal).connect()
    assert (again.head, again.participants()) == (desk.head, list(NAMES))
    assert again.sent(type(desk.head)) == [desk.head]
    assert again.report("a") == [Verdict.DUPLICATE]
    again.report("c", "d")
    assert again.machine.replica.index == 1
    assert again.participants() == list(NAMES)  # who has reported is ready, even if its presence has not come


def test_an_open_round_of_a_restarted_server_has_a_deadline() -> None:
    desk = Desk().connect().join()
    desk.report("a", "b")
    again = Desk(journal=desk.journal).connect()
    again.wait(9.9)
    assert again.head.round == 1
    again.wait(0.2)
    assert again.machine.replica.index == 1
    assert again.participants() == ["a", "b"]


def test_between_two_rounds_it_goes_on_with_those_that_have_reported() -> None:
    desk = Desk(change(SETTINGS, devices=3)).connect().join("a", "b", "c")
    desk.report("a", "c")
    desk.wait(10.0)
    journal = desk.journal[:-1]  # without the announcement of round 2
    assert journal[-1][0] == "update"
    again = Desk(desk.settings, journal=journal).connect()
    assert again.head == desk.head
    assert again.participants() == ["a", "c"]


def test_a_refusal_is_remembered() -> None:
    desk = Desk().connect().join()
    desk.report("a", samples=0)
    again = Desk(journal=desk.journal).connect().join()
    assert again.report("a", samples=0) == [Verdict.REFUSED]
    assert again.kinds().count("refusal") == 1
    again.report("b", "c", "d")
    assert again.machine.replica.index == 1


def test_a_stopped_run_can_be_resumed() -> None:
    desk = Desk().connect().join()
    desk.report("a")
    desk.wait(30.0)
    assert isinstance(desk.finish().error, QuorumError)
    again = Desk(journal=desk.journal)
    assert not again.machine.finished
    again.connect().join()
    again.play()
    assert again.finish() == Finish()
    assert again.machine.replica.digest == Desk().connect().join().play().machine.replica.digest


def test_a_run_that_stopped_as_nobody_could_compute_asks_again() -> None:
    """Somebody has perhaps mended the devices, or brought others."""
    desk = Desk(change(SETTINGS, devices=2)).connect().join("a", "b")
    desk.decline("a", "b")
    assert isinstance(desk.finish().error, QuorumError)
    again = Desk(desk.settings, journal=desk.journal).connect()
    assert not again.machine.finished
    again.join("a")
    assert again.phases() == ["train"]
    again.join("c")
    assert again.phases() == ["train", "train"]
    assert again.participants() == ["a", "c"]
    again.report()
    assert again.machine.replica.index == 1


def test_devices_keep_their_numbers() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().join("c", "d").join("b", "a")
    ordinals = {name: member.ordinal for name, member in desk.machine.roster.members.items()}
    assert ordinals == {"c": 0, "d": 1, "b": 2, "a": 3}
    again = Desk(desk.settings, journal=desk.journal).connect().join()
    assert {name: member.ordinal for name, member in again.machine.roster.members.items()} == ordinals
    assert [again.orders(name)[-1].ordinal for name in "cdba"] == [0, 1, 2, 3]


def test_a_device_that_starts_again_is_welcome_under_its_new_session() -> None:
    desk = Desk().connect().join()
    desk.sessions["a"] = 5
    desk.hello("a")
    order = desk.orders("a")[-1]
    assert (order.session, order.ordinal) == (5, 0)
    assert desk.kinds().count("enrolment") == 4
    desk.report("b", "c", "d")
    assert desk.head.round == 1  # it is waited for
    desk.presence("a", session=4, status="lost")  # the will of the session before
    assert desk.head.round == 1
    assert desk.report("a") == [Verdict.ACCEPTED]
    assert desk.head.round == 2
    assert "a" in desk.participants()


# --- damaged journals -----------------------------------------------------------------------------------------------


def edited(edit: Callable[[list[Entry]], None]) -> list[Entry]:
    journal = list(undisturbed().journal)
    edit(journal)
    return journal


def swap_updates(journal: list[Entry]) -> None:
    first, second = [i for i, entry in enumerate(journal) if entry[0] == "update"][:2]
    journal[first], journal[second] = journal[second], journal[first]


def change_update(journal: list[Entry]) -> None:
    i = next(i for i, entry in enumerate(journal) if entry[0] == "update")
    record = UpdateRecord.decode(journal[i][3])
    changed = dataclasses.replace(record, coefficients=np.zeros_like(record.coefficients))
    journal[i] = (*journal[i][:3], changed.encode())


def cut_mask(journal: list[Entry]) -> None:
    i = next(i for i, entry in enumerate(journal) if entry[0] == "mask")
    journal[i] = (*journal[i][:3], journal[i][3][:-3])


@pytest.mark.parametrize("edit", [swap_updates, change_update, cut_mask])
def test_a_journal_that_gives_other_weights_is_refused(edit: Callable[[list[Entry]], None]) -> None:
    with pytest.raises(ProtocolError):
        Desk(SPARSE, journal=edited(edit))


@pytest.mark.parametrize("settings", [change(SPARSE, seed=5), change(SPARSE, learning_rate=0.5)])
def test_a_journal_of_another_run_is_refused(settings: RunSettings) -> None:
    with pytest.raises(ProtocolError, match="other settings"):
        Desk(settings, journal=undisturbed().journal)


def test_a_damaged_introduction_is_refused() -> None:
    journal = [("run", 0, "", undisturbed().journal[0][3]), ("enrolment", 0, "a", b"{}")]
    with pytest.raises(ProtocolError, match=Hello.KIND):
        Desk(SPARSE, journal=journal)  # type: ignore[arg-type]


# --- with devices and a network -------------------------------------------------------------------------------------

SMALL = change(SETTINGS, sparsity=0.5, rounds=2, devices=2, quorum=2, evaluate_every=1)


@functools.cache
def small_world(estimator: EstimatorName = "stein") -> World:
    world = World(change(SMALL, estimator=estimator), 2, has_test_set=True).start().finish()
    check_end(world)
    return world


@pytest.mark.parametrize(
    ("estimator", "number"),
    [(name, number) for name in ESTIMATORS for number in range(len(small_world(name).server.trace))],
)
def test_a_crash_before_any_command_leads_to_the_same_end(estimator: EstimatorName, number: int) -> None:
    """Between a Record and the Send that tells of it, for example; devices and broker live on."""
    expected = small_world(estimator)
    world = World(expected.server.run.settings, 2, has_test_set=True)
    world.server.crash_before = number
    world.start().finish()
    check_end(world)
    assert world.server.lives == 2
    assert world.server.coordinator.replica.digest == expected.server.coordinator.replica.digest
    assert world.server.coordinator.replica.head == expected.server.coordinator.replica.head
    check_order(world.server.trace)


@pytest.mark.parametrize(
    ("estimator", "k", "tail_k", "positions"),
    [("stein", 16, 1, [64]), ("split", 8, 4, [32, 16]), ("node", 8, 16, [32, 12])],
)
def test_a_dealt_round_over_the_whole_basis_gives_the_gradient(
    estimator: EstimatorName, k: int, tail_k: int, positions: list[int]
) -> None:
    """Four devices with the same data, a quarter of the directions each; a step of plain descent shows the gradient.

    Of the 40 weights 28 lie in front of the cut; sketches are shared, so each device sends the whole basis of them.
    """
    rate = 0.5
    optimiser = dataclasses.replace(SETTINGS.training.optimiser, name="sgd")
    settings = change(
        SETTINGS, rounds=1, k=k, tail_k=tail_k, sigma=1e-4, two_sided=True, learning_rate=rate, optimiser=optimiser,
        quorum=4, estimator=estimator,
    )  # fmt: skip
    world, engine = World(settings, 4), FakeEngine("everybody")
    for node in world.devices.values():
        node.engine = engine
    world.start()
    start = world.server.coordinator.replica.weights.astype(np.float64)
    world.finish()
    check_end(world)
    machine = world.server.coordinator
    found = (start - machine.replica.weights.astype(np.float64)) / rate
    exact = engine.gradient(machine.mask, start)
    assert [block.n_positions for block in machine.replica.blocks] == positions
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-3
