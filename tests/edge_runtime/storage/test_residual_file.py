"""residual_file: a state comes back for its run, its mask and its round, and for nothing else."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.edge_runtime.storage import residual_file
from fedzo.edge_runtime.storage.residual_file import Residual, ResidualFile, carried_by, residual_key
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import RunDocument

RUN = RunDocument("run-1", "ab" * 32, 1_000, RunSettings())
KEY = residual_key(RUN, "cd")
RESIDUAL = Residual(KEY, 7, b"before", b"after it")


def test_a_residual_comes_back_for_its_run_and_mask(tmp_path: Path) -> None:
    file = ResidualFile(tmp_path / "residual")
    assert file.load(KEY, "run-1") is None
    file.save(dataclasses.replace(RESIDUAL, round=6))
    file.save(RESIDUAL)
    assert ResidualFile(tmp_path / "residual").load(KEY, "run-1") == RESIDUAL
    other_seed = dataclasses.replace(RUN, settings=dataclasses.replace(RUN.settings, seed=2))
    for key in (residual_key(RUN, ""), residual_key(other_seed, "cd")):
        assert file.load(key, "run-1") is None


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
    residual = file.load(KEY, "run-1")
    assert residual == dataclasses.replace(SENT, is_lost=is_lost)
    assert residual is not None
    expected = [1.0, 4.0, 0.0, 0.75] if comes_back else [1.0, 0.0, 2.0, 0.5]
    assert np.frombuffer(residual.state_for(9, log_length, recent), "<f4").tolist() == expected
    assert residual.state_for(7, log_length, recent) == SENT.before


@pytest.mark.parametrize("damage", [b"", b"FZR2", b"FZO1" + bytes(100), None])
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_file_is_dropped(
    tmp_path: Path, damage: bytes | None, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever it is: nobody can tell any more which of the two was written last."""
    file = ResidualFile(tmp_path / "residual")
    file.save(RESIDUAL)
    file.save(dataclasses.replace(RESIDUAL, round=8, before=RESIDUAL.after, after=b"after 8!"))
    path = file.paths[place]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data) if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        assert file.load(KEY, "run-1") is None
    assert "damaged" in caplog.text
    assert file.load(KEY, "run-1") is None
    file.save(RESIDUAL)
    assert file.load(KEY, "run-1") == RESIDUAL


def test_a_file_that_cannot_be_written_or_read_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        ResidualFile(tmp_path / "folder" / "residual").save(RESIDUAL)
        (tmp_path / "taken-a").mkdir()
        assert ResidualFile(tmp_path / "taken").load(KEY, "run-1") is None
    assert "cannot be written" in caplog.text
    assert "cannot be read" in caplog.text


def state(number: int) -> bytes:
    return np.full(1000, number, "<f4").tobytes()


def test_a_round_writes_one_state(tmp_path: Path) -> None:
    file = ResidualFile(tmp_path / "residual")
    sizes = []
    for round_ in range(1, 6):
        before = b"" if round_ == 1 else state(round_ - 1)
        residual = Residual(KEY, round_, before, state(round_), round_)
        file.save(residual)
        assert ResidualFile(tmp_path / "residual").load(KEY, "run-1") == residual
        sizes.append(max(path.stat().st_size for path in file.paths if path.exists()))
    assert max(sizes) < 4_000 + 200
    assert {path.name for path in tmp_path.iterdir()} == {"residual-a", "residual-b"}


OPERATIONS = ("next", "next", "again", "lost", "nothing", "other run", "restart", "full disk")


@given(st.lists(st.sampled_from(OPERATIONS), max_size=25))
@settings(max_examples=60, deadline=None)
def test_what_was_saved_last_comes_back(operations: list[str]) -> None:
    """Whatever happens in between, as a device does it: both states, bit for bit, and the flag."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "residual"
        file, kept, key, fresh = ResidualFile(place), None, KEY, 100
        for operation in operations:
            fresh += 1
            carried = carried_by([np.array([fresh % 1000])], [np.array([0.5], np.float32)])
            if operation == "restart":
                file = ResidualFile(place)
            elif operation == "lost" and kept is not None:
                kept = dataclasses.replace(kept, is_lost=True)
                file.save(kept)
            elif operation == "other run":
                key = bytes([fresh]) * 32
                kept = Residual(key, 1, b"", state(fresh), 0, carried)
                file.save(kept)
            elif operation == "full disk":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(residual_file, "write_durably", _full)
                    file.save(Residual(key, fresh, state(fresh), state(fresh), 0, carried))
            elif operation in ("next", "again", "nothing"):
                last = kept or Residual(key, 0, b"", b"")
                round_ = last.round if operation == "again" else last.round + 1
                before = last.given_back() if operation == "nothing" else last.state_for(round_, max(0, round_ - 1))
                kept = Residual(key, round_, before, state(fresh), max(0, round_ - 1), carried)
                file.save(kept)
            assert ResidualFile(place).load(key, "run-1") == kept
        assert file.load(bytes(32), "run-1") is None


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")
