"""The numbers of a run."""

from __future__ import annotations

import dataclasses

import pytest

from fedzo.broker_server.history.summary import summarise
from fedzo.broker_server.journal import MemoryJournal
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Hello, RunDocument
from tests.protocol.builders import seeded_coefficients, small_manifest

TRAFFIC = {
    "fedzo/v1/default/log": (500, 0),  # sent once, received by every device
    "fedzo/v1/default/s/a/ack": (60, 0),
    "fedzo/v1/default/s/b/ack": (40, 0),
    "fedzo/v1/default/d/a/report": (0, 700),
    "fedzo/v1/default/d/b/report": (0, 300),
    "(other)": (9, 11),  # beyond the topics that are counted one by one: nearly all of it concerns one device
}


@pytest.fixture
def coordinator() -> Coordinator:
    """After four updates, with two devices."""
    found = Coordinator(RunDocument("run", "00" * 32, 1, RunSettings()), small_manifest(), birth=1)
    for name in ("a", "b"):
        found.roster.enrol(name, Hello(1, "", 0.0, 0, 0, "", ""))
    for index in range(4):
        found.replica.prepare(index, index, 0.5, ((2 * index, 2),), seeded_coefficients(1, index, 2))
    return found


@pytest.mark.parametrize(("resumed_at", "updates"), [(0, 4), (2, 2), (3, 1), (4, 1)])
def test_traffic_belongs_to_the_updates_of_this_process(
    coordinator: Coordinator, resumed_at: int, updates: int
) -> None:
    summary = summarise(coordinator, MemoryJournal(), TRAFFIC, resumed_at=resumed_at)
    assert summary.rounds == 4
    assert summary.bytes_up_per_device_round == pytest.approx((700 + 300 + 11) / 2 / updates, abs=0.1)
    assert summary.bytes_down_per_device_round == pytest.approx((500 + (60 + 40 + 9) / 2) / updates, abs=0.1)


def end(coordinator: Coordinator) -> None:
    coordinator.head = dataclasses.replace(coordinator.head, phase="done")


@pytest.mark.parametrize(
    ("states", "agree"),
    [
        ({"a": ("done", "own"), "b": ("done", "own")}, True),
        ({"a": ("done", "own"), "b": ("done", "other")}, False),
        ({"a": ("done", "other"), "b": ("lost", "")}, False),
        ({"a": ("done", "own"), "b": ("lost", "")}, None),  # it did not say
        ({"a": ("done", "own"), "b": ("left", "other")}, None),  # before the end
        ({"a": ("done", "own"), "b": ("left", "own")}, True),
        ({"a": ("done", "own"), "b": ("refused", "")}, True),  # it never took part
        ({"a": ("refused", ""), "b": ("refused", "")}, None),
    ],
    ids=str,
)
def test_who_agrees(coordinator: Coordinator, states: dict[str, tuple[str, str]], agree: bool | None) -> None:
    digests = {"own": coordinator.replica.digest.hex(), "other": "00" * 16, "": ""}
    for name, (status, digest) in states.items():
        member = coordinator.roster.members[name]
        member.status, member.weights_digest = status, digests[digest]  # type: ignore[assignment]
    assert summarise(coordinator, MemoryJournal(), {}).digests_agree is None  # the run is not done
    end(coordinator)
    assert summarise(coordinator, MemoryJournal(), {}).digests_agree is agree


def test_who_was_excused_is_named_and_does_not_count(coordinator: Coordinator) -> None:
    digest = coordinator.replica.digest.hex()
    first, second = coordinator.roster.members["a"], coordinator.roster.members["b"]
    first.status, first.weights_digest, first.micro_batch_limit = "done", digest, 2
    second.status, second.micro_batch, second.micro_batch_limit = "ready", 1, 0
    end(coordinator)
    summary = summarise(coordinator, MemoryJournal(), {})
    assert summary.excused == ("b: over the memory budget with a micro-batch of 1",)
    assert summary.digests_agree
