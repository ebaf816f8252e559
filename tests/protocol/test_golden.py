"""The committed golden vectors: what every machine and every release must compute."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.protocol.golden.cases import CASES
from tests.protocol.golden.make import VECTORS


@pytest.fixture(scope="module")
def vectors() -> Any:
    return json.loads(VECTORS.read_text(encoding="utf-8"))


def test_every_case_is_committed(vectors: Any) -> None:
    assert set(vectors) == set(CASES)


@pytest.mark.parametrize("name", list(CASES))
def test_golden_vectors(vectors: Any, name: str) -> None:
    assert CASES[name]() == vectors[name]
