"""What random schedules have found, one test each, with as few events as it takes.

The schedules themselves are in ``test_exactly_once.py``; their numbers mean something else after every change of the
table that plans are drawn from, so what they find is written down here.
"""

from __future__ import annotations

import pytest

from fedzo.protocol.errors import QuorumError
from fedzo.protocol.server_side.coordinator_events import Finish, ScoresChecked, Send
from fedzo.protocol.settings import SaliencySettings
from fedzo.protocol.wire.documents import Announcement, Hello, ServerPresence
from fedzo.protocol.wire.messages import Decline
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobRequest, LogRequest
from tests.protocol.simulation.bench import Bench, hello
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change


def at_the_last_round(**changes: object) -> Desk:
    """Every update is made, the evaluation is open."""
    desk = Desk(change(SETTINGS, rounds=1, **changes)).connect().join()
    desk.report()
    assert desk.head.phase == "evaluate"
    return desk


def digest(desk: Desk) -> str:
    """Of the final weights."""
    return desk.machine.replica.digest.hex()


def test_a_board_whose_link_breaks_in_the_last_round_still_gets_the_last_update() -> None:
    """It was lost for two seconds, the others ended, and the server left: the board stayed behind for ever."""
    desk = at_the_last_round()
    desk.presence("d", status="lost")
    desk.report("a", "b", "c")
    desk.presence("a", "b", "c", status="done", weights_digest=digest(desk))
    assert not desk.machine.finished
    desk.presence("d")
    desk.say("d", LogRequest(0, 1))
    assert len(desk.out) == 1
    desk.presence("d", status="done", weights_digest=digest(desk))
    assert desk.finish() == Finish()


def test_a_board_that_joins_as_the_run_ends_is_waited_for_though_its_link_breaks() -> None:
    desk = at_the_last_round()
    desk.hello("e")
    desk.report("a", "b", "c", "d")
    desk.presence("e", status="lost").presence("a", "b", "c", "d", status="done", weights_digest=digest(desk))
    assert not desk.machine.finished


def test_a_board_that_missed_a_deadline_is_waited_for_at_the_end() -> None:
    """Its request for a block was lost, and before it asked again the others had ended."""
    desk = at_the_last_round()
    desk.report("a", "b", "c")
    desk.wait(SETTINGS.deadline_s)
    assert desk.head.phase == "done"
    desk.presence("a", "b", "c", status="done", weights_digest=digest(desk))
    assert not desk.machine.finished
    desk.say("d", LogRequest(0, 1))
    desk.presence("d", status="done", weights_digest=digest(desk))
    assert desk.finish() == Finish()


def test_with_sampling_the_end_is_for_everybody() -> None:
    """The announcement of the end named the devices that a round of training would have drawn."""
    desk = Desk(change(SETTINGS, rounds=1, participants=2)).connect().join()
    while desk.head.phase != "done":
        desk.report()
    assert desk.participants() == list(NAMES)


def test_a_board_that_left_for_good_does_not_hold_the_end() -> None:
    desk = at_the_last_round()
    desk.presence("d", status="left")
    desk.report("a", "b", "c")
    desk.presence("a", "b", "c", status="done", weights_digest=digest(desk))
    assert desk.finish() == Finish()


def test_boards_that_decline_at_once_do_not_use_up_the_patience_while_another_plans_again() -> None:
    """A thousand rounds were opened and declined before a board had time to plan with a smaller micro-batch."""
    desk = Desk(change(SETTINGS, devices=3)).connect().join("a", "b", "c")
    desk.micro_batches["c"] = 8
    desk.decline("c", why=Decline.OVER_BUDGET)
    desk.decline("b", why=Decline.NO_DATA)
    desk.report("a")
    assert desk.head.round == 2  # without c
    desk.decline("b", why=Decline.NO_DATA)
    desk.report("a")
    assert desk.head.round == 2
    desk.wait(SETTINGS.deadline_s / 2)
    assert not desk.machine.finished
    desk.micro_batches["c"] = 4
    desk.presence("c")
    assert (desk.head.round, desk.participants()) == (3, ["a", "b", "c"])


def test_a_round_without_its_quorum_is_announced_again() -> None:
    """The broker had kept an older announcement: boards that came back never heard of the round, and all waited."""
    desk = Desk(change(SETTINGS, quorum=3)).connect().join("a", "b", "c", "d")
    desk.report("a")
    desk.wait(SETTINGS.deadline_s)
    assert desk.head.round == 1
    again = [c.message for c in desk.trace if isinstance(c, Send) and c.channel is Channel.HEAD]
    assert [head.round for head in again if isinstance(head, Announcement)] == [0, 1, 1]
    desk.report("b", "c", "d")
    assert desk.machine.replica.index == 1


def test_draws_of_boards_that_cannot_compute_do_not_go_on_for_ever() -> None:
    """There was always somebody who had not been drawn, so every round that failed was followed by another at once."""
    desk = Desk(change(SETTINGS, participants=2)).connect().join()
    for _ in range(10 * SETTINGS.patience):
        if desk.machine.finished:
            break
        desk.decline(*desk.waiting(), why=Decline.NO_DATA)
    assert isinstance(desk.finish().error, QuorumError)
    assert desk.head.round <= SETTINGS.patience


@pytest.mark.parametrize("difference", [0.0, 9.0])
def test_scores_that_are_not_checked_at_the_deadline_are_not_used_before_they_are(difference: float) -> None:
    """The deadline of a scoring round closed it with scores that the server had not computed again."""
    desk = Desk(change(SETTINGS, sparsity=0.5, saliency=SaliencySettings(samples=8))).connect()
    desk.differences = {"c": None}
    desk.join().report()
    desk.wait(3 * SETTINGS.deadline_s)
    assert desk.phases() == ["saliency"]
    desk.on(ScoresChecked(1, "c", difference))
    assert desk.phases() == ["saliency", "train"]
    assert ("refusal" in desk.kinds()) is (difference > 0.0)


def test_a_board_whose_clock_was_set_back_says_hello_at_the_next_message() -> None:
    """Its hello had been lost, the next one was due half a minute later, and the run ended before."""
    bench = Bench().connect()
    bench.hear(Channel.RUN, bench.run)
    assert bench.sent(Hello) == [hello()]
    bench.now -= 30.0
    bench.hear(Channel.HEAD, bench.head())
    assert bench.sent(Hello) == [hello()]
    bench.hear(Channel.HEAD, bench.head())
    assert bench.sent(Hello) == []


def test_a_board_that_is_not_enrolled_says_hello_to_a_server_that_starts_again() -> None:
    """The only enrolled board had no samples, so that the run stopped again before the hello was due."""
    bench = Bench().connect()
    bench.hear(Channel.RUN, bench.run)
    bench.hear(Channel.SERVER, ServerPresence(False, 1))
    assert bench.sent(Hello) == []
    bench.hear(Channel.SERVER, ServerPresence(True, 2))
    assert bench.sent(Hello) == [hello()]
    bench.hear(Channel.SERVER, ServerPresence(True, 2))
    assert bench.sent(Hello) == []


def test_a_board_asks_a_server_that_starts_again_for_what_it_asked_the_one_before() -> None:
    """Its request for a block was lost. The others could not compute, and the run stopped before it asked again."""
    bench = Bench(kept={}).connect().join()
    (request,) = bench.sent(BlobRequest)
    bench.hear(Channel.SERVER, ServerPresence(False, 1))
    assert bench.sent(BlobRequest) == []
    bench.hear(Channel.SERVER, ServerPresence(True, 2))
    assert bench.sent(BlobRequest) == [request]
