"""Chaos over real processes; see ``chaos.py``. FEDZO_CHAOS_MINUTES=5 adds a long run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.broker_fixtures import needs_mosquitto
from tests.end_to_end.chaos import episode, undisturbed
from tests.end_to_end.conftest import MakeFleet

pytestmark = [needs_mosquitto, pytest.mark.slow]
BOARDS, ROUNDS = 4, 60
LONG_MIN = float(os.environ.get("FEDZO_CHAOS_MINUTES", "0"))


@pytest.mark.parametrize(("quorum", "seconds"), [(BOARDS, 20.0), (BOARDS - 1, 10.0)], ids=["all", "most"])
def test_nothing_that_was_accepted_is_lost(quorum: int, seconds: float, make_fleet: MakeFleet, tmp_path: Path) -> None:
    expected = undisturbed(make_fleet, BOARDS, ROUNDS) if quorum == BOARDS else None
    found = episode(
        make_fleet, tmp_path, boards=BOARDS, quorum=quorum, rounds=ROUNDS, seconds=seconds,
        seed=f"suite/{quorum}", expected=expected,
    )  # fmt: skip
    assert sum(found["disturbances"].values()) >= 3


@pytest.mark.skipif(not LONG_MIN, reason="takes minutes; set FEDZO_CHAOS_MINUTES=5")
@pytest.mark.timeout(60 * LONG_MIN + 600)
def test_nothing_is_lost_for_longer(make_fleet: MakeFleet, tmp_path: Path) -> None:
    expected = undisturbed(make_fleet, BOARDS, ROUNDS)
    deadline, number = time.monotonic() + 60 * LONG_MIN, 0
    while (left_s := deadline - time.monotonic()) > 0:
        quorum = BOARDS - number % 2
        (tmp_path / str(number)).mkdir()
        episode(
            make_fleet, tmp_path / str(number), boards=BOARDS, quorum=quorum, rounds=ROUNDS, seconds=left_s,
            seed=f"long/{number}", expected=expected if quorum == BOARDS else None,
        )  # fmt: skip
        number += 1
