"""residual_file: a state comes back for its run, its mask and its round, and for nothing else."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.residual_file import Residual, ResidualFile, carried_by, residual_key
from fedzo.protocol.documents import RunDocument
from fedzo.protocol.settings import RunSettings

RUN = RunDocument("run-1", "ab" * 32, 1_000, RunSettings())
KEY = residual_key(RUN, "cd")
RESIDUAL = Residual(KEY, 7, b"before", b"after it")


def test_a_residual_comes_back_for_its_run_and_mask(tmp_path: Path) -> None:
    file = ResidualFile(tmp_path / "residual")
    assert file.load(KEY) is None
    file.save(dataclasses.replace(RESIDUAL, round=6))
    file.save(RESIDUAL)
    assert ResidualFile(tmp_path / "residual").load(KEY) == RESIDUAL
    other_seed = dataclasses.replace(RUN, settings=dataclasses.replace(RUN.settings, seed=2))
    for key in (residual_key(RUN, ""), residual_key(other_seed, "cd")):
        assert file.load(key) is None


@pytest.mark.parametrize(("round_", "state"), [(6, b""), (7, b"before"), (8, b"after it"), (100, b"after it")])
def test_a_round_that_is_measured_again_begins_where_it_began(round_: int, state: bytes) -> None:
    """Nothing of a gradient counts twice; and the same run begun anew begins with nothing."""
    assert RESIDUAL.state_for(round_) == state


SENT = Residual(
    KEY,
    7,
    np.zeros(4, "<f4").tobytes(),
    np.array([1.0, 0.0, 2.0, 0.5], "<f4").tobytes(),
    5,
    carried_by([np.array([1]), np.array([2, 3])], [np.array([4.0], np.float32), np.array([-2.0, 0.25], np.float32)]),
)


@pytest.mark.parametrize(
    ("is_lost", "log_length", "recent", "comes_back"),
    [
        (False, 6, ((5, 7),), False),
        (True, 6, ((5, 7),), True),
        (False, 5, ((4, 6),), True),  # the same weights again: the round made no update
        (False, 6, ((4, 6), (5, 8)), True),  # another round made it
        (False, 50, ((48, 60), (49, 61)), False),  # nobody knows any more
    ],
)
def test_what_did_not_count_comes_back(
    tmp_path: Path, is_lost: bool, log_length: int, recent: tuple[tuple[int, int], ...], comes_back: bool
) -> None:
    file = ResidualFile(tmp_path / "residual")
    file.save(dataclasses.replace(SENT, is_lost=is_lost))
    residual = file.load(KEY)
    assert residual == dataclasses.replace(SENT, is_lost=is_lost)
    assert residual is not None
    expected = [1.0, 4.0, 0.0, 0.75] if comes_back else [1.0, 0.0, 2.0, 0.5]
    assert np.frombuffer(residual.state_for(9, log_length, recent), "<f4").tolist() == expected
    assert residual.state_for(7, log_length, recent) == SENT.before


@pytest.mark.parametrize("damage", [b"", b"FZR1", b"FZO1" + bytes(100), None])
def test_a_damaged_file_is_dropped(tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    file = ResidualFile(tmp_path / "residual")
    file.save(RESIDUAL)
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    file.path.write_bytes(bytes(data) if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        assert file.load(KEY) is None
    assert "damaged" in caplog.text
    file.save(RESIDUAL)
    assert file.load(KEY) == RESIDUAL


def test_a_file_that_cannot_be_written_or_read_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        ResidualFile(tmp_path / "folder" / "residual").save(RESIDUAL)
        (tmp_path / "taken").mkdir()
        assert ResidualFile(tmp_path / "taken").load(KEY) is None
    assert "cannot be written" in caplog.text
    assert "cannot be read" in caplog.text
