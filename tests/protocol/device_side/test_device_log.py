"""The device's state machine: following the log."""

from __future__ import annotations

import dataclasses

import pytest

from fedzo.protocol.device_side import log_follower
from fedzo.protocol.device_side.device_events import (
    Compute,
    Finish,
)
from fedzo.protocol.errors import SelfTestError
from fedzo.protocol.wire.messages import Receipt, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import LogRequest, LogSlice
from tests.protocol.simulation.bench import RETRY_S, Bench
from tests.protocol.simulation.fakes import TAG


def test_missing_records_are_asked_for_and_replayed() -> None:
    bench = Bench()
    for round_ in range(1, 6):
        bench.update(round_)
    bench.plan()
    bench.announce(round_=6)
    assert bench.sent(LogRequest) == [LogRequest(0, 5)]
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log[:2])))
    assert bench.sent(LogRequest) == [LogRequest(2, 3)]
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log[:2])))
    assert bench.out == []
    bench.hear(Channel.BLOCK, LogSlice(1, tuple(bench.log[1:])))
    assert bench.device.stage == "computing"
    assert bench.device.replica is not None
    assert bench.device.replica.digest == bench.server.digest
    assert bench.sent(LogRequest) == []


@pytest.mark.parametrize(("entries", "count"), [(0, 1), (1.0, 1), (2.9, 2), (3.0, 3), (100.0, 5)])
def test_a_large_model_asks_for_few_records_at_a_time(
    entries: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    for round_ in range(1, 6):
        bench.update(round_)
    bench.plan()
    monkeypatch.setattr(log_follower, "REQUEST_ENTRIES", int(entries * bench.server.weights.size))
    bench.announce(round_=6)
    done = 0
    while done < 5:
        asked = min(count, 5 - done)
        assert bench.sent(LogRequest) == [LogRequest(done, asked)]
        bench.hear(Channel.BLOCK, LogSlice(done, tuple(bench.log[done : done + asked])))
        done += asked
    assert bench.device.stage == "computing"


def test_updates_are_replayed_as_they_come() -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    bench.hear(Channel.LOG, bench.update(1))
    assert bench.device.stage == "idle"
    assert bench.device.replica is not None
    assert bench.device.replica.digest == bench.server.digest
    bench.announce(round_=2)
    assert bench.only(Compute).task.weights_digest == bench.server.digest


def test_an_update_before_its_announcement_is_no_divergence_however_long_that_takes() -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    bench.hear(Channel.LOG, bench.update(1))
    bench.wait(1_000.0)
    assert bench.device.replica is not None
    assert bench.device.replica.index == 1
    assert bench.device.stage == "idle"
    bench.hear(Channel.LOG, bench.update(5))  # rounds 2 to 5 were announced to others only
    bench.hear(Channel.HEAD, bench.head(round_=3, log_length=1, log_head="00" * 16))
    assert bench.device.replica.index == 2
    assert bench.device.stage == "idle"
    bench.announce(round_=6)
    assert bench.device.stage == "computing"


def test_repeated_gapped_and_foreign_updates_change_nothing() -> None:
    bench = Bench()
    bench.compute()
    first, second, third = bench.update(1), bench.update(2), bench.update(3)
    stranger = Bench(settings=dataclasses.replace(bench.run.settings, seed=99))
    foreign = [stranger.update(1), stranger.update(2), stranger.update(3)]
    bench.hear(Channel.LOG, *foreign, *foreign, third, second)
    assert bench.device.replica is not None
    assert bench.device.replica.index == 0
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(foreign)))  # nobody asked
    assert bench.device.replica.index == 0
    bench.hear(Channel.LOG, first, first, second, second, *foreign, third)
    assert bench.device.replica.digest == bench.server.digest
    assert not bench.device.finished


def test_a_digest_mismatch_starts_over_once_and_then_refuses() -> None:
    bench = Bench()
    for round_ in range(1, 4):
        bench.update(round_)
    wrong = dataclasses.replace(bench.log[2], digest=bytes(16))
    bench.plan()
    bench.announce(round_=4)
    bench.hear(Channel.BLOCK, LogSlice(0, (*bench.log[:2], wrong)))
    assert bench.device.replica is not None
    assert bench.device.replica.index == 0
    assert not bench.device.finished
    bench.hear(Channel.BLOCK, LogSlice(0, (*bench.log[:2], wrong)))  # the same answer twice is one failure
    assert bench.device.replica.index == 0
    assert not bench.device.finished
    bench.wait(RETRY_S)
    assert bench.sent(LogRequest) == [LogRequest(0, 3)]
    bench.hear(Channel.BLOCK, LogSlice(0, (*bench.log[:2], wrong)))
    error = bench.only(Finish).error
    assert isinstance(error, SelfTestError)
    assert "doctor" in error.hint
    assert bench.presence().status == "refused"


def test_starting_over_helps_when_the_log_is_right() -> None:
    """And a success in between makes the next failure the first one again."""
    bench = Bench()
    bench.plan()
    for round_ in (3, 6):
        bench.update(round_ - 2)
        bench.update(round_ - 1)
        wrong = dataclasses.replace(bench.log[-1], digest=bytes(16))
        bench.announce(round_=round_)
        first = bench.server.index - 2
        bench.hear(Channel.BLOCK, LogSlice(first, (bench.log[first], wrong)))
        assert bench.device.stage == "following"
        bench.wait(RETRY_S)
        bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
        assert bench.device.replica is not None
        assert bench.device.replica.digest == bench.server.digest
        bench.prepare()
        bench.answer(bench.only(Compute).task)


def test_a_server_that_lost_updates_is_followed_from_the_start() -> None:
    """Its journal was brought back from a copy: its log is shorter, or goes on differently."""
    bench = Bench()
    bench.plan()
    bench.announce()
    bench.answer(bench.only(Compute).task)
    bench.hear(Channel.LOG, bench.update(1))
    bench.hear(Channel.LOG, bench.update(2))
    bench.hear(Channel.LOG, bench.update(3))
    assert bench.device.replica is not None
    assert bench.device.replica.index == 3
    bench.follow(bench.mask)
    bench.update(11)
    bench.announce(round_=12)
    assert bench.sent(LogRequest) == [LogRequest(0, 1)]
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    assert bench.device.stage == "computing"
    assert bench.device.replica.digest == bench.server.digest


def test_another_head_at_the_same_length_starts_over() -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    bench.hear(Channel.LOG, bench.update(1))
    bench.follow(bench.mask)
    bench.update(7)
    bench.announce(round_=8)
    assert bench.sent(LogRequest) == [LogRequest(0, 1)]
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    assert bench.device.stage == "computing"


def test_other_settings_of_the_server_are_refused_in_the_end() -> None:
    """The head of the empty log covers every setting of the replay."""
    bench = Bench().plan()
    bench.hear(Channel.HEAD, bench.head(log_head="11" * 16))
    bench.prepare()
    bench.wait(100.0)
    assert isinstance(bench.only(Finish).error, SelfTestError)
