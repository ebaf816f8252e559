"""The committed golden vectors: what every machine and every release must compute."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.protocol.golden import cases, round_cases
from tests.protocol.golden.make import VECTORS

FILES = {VECTORS: cases.CASES, round_cases.ROUNDS: round_cases.CASES}


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FILES}


def test_every_case_is_committed(committed: dict[str, Any]) -> None:
    assert committed.keys() == {path.name for path in FILES}
    for path, found in FILES.items():
        assert set(committed[path.name]) == set(found)


@pytest.mark.parametrize(
    ("file", "name"), [pytest.param(path, name, id=name) for path, found in FILES.items() for name in found]
)
def test_golden_vectors(committed: dict[str, Any], file: Any, name: str) -> None:
    assert FILES[file][name]() == committed[file.name][name]


@pytest.mark.parametrize("name", [name for name, _, _ in round_cases.RUNS])
def test_whole_runs_have_what_they_are_for(committed: dict[str, Any], name: str) -> None:
    """Late scalars where they may count, and everybody ends where the server does."""
    found = committed[round_cases.ROUNDS.name]["runs"][name]
    (settings,) = (settings for each, settings, _ in round_cases.RUNS if each == name)
    assert (max(map(int, found["segments by age"])) > 0) == (settings.staleness > 0)
    assert found["head"] == found["from the log"] == found["from the snapshot"]
    assert found["updates"] == settings.training.rounds
