"""When and how a lost connection is tried again."""

from __future__ import annotations

from fedzo.edge_runtime.connection import retry as retry_module
from fedzo.edge_runtime.connection.link_loss import Loss
from fedzo.edge_runtime.connection.retry import Retry

LOST = Loss("lost")
REFUSED = Loss("refused", version_refused=True)
SILENT = Loss("dropped", silent=True)


def protocol(retry: Retry) -> str:
    return retry.protocol


def test_the_next_attempt_speaks_what_worked() -> None:
    retry = Retry()
    assert protocol(retry) == "5"
    assert retry.delay_s(REFUSED, stable=False) is None
    assert protocol(retry) == "3.1.1"
    retry.accepted()
    assert retry.delay_s(LOST, stable=True) is not None
    assert protocol(retry) == "3.1.1", "a refusal is remembered"
    assert retry.delay_s(SILENT, stable=False) is not None
    assert protocol(retry) == "5", "another broker may be there now"

    retry = Retry()
    assert retry.delay_s(SILENT, stable=False) is None
    assert protocol(retry) == "3.1.1"
    retry.accepted()
    assert retry.delay_s(LOST, stable=True) is not None
    assert protocol(retry) == "5", "a dropped link is only a guess"
    retry.accepted()
    assert retry.connack_timeout_s == retry_module._CONNACK_TIMEOUT_S


def test_backoff_grows_is_spread_and_starts_anew() -> None:
    retry = Retry()
    retry.accepted()
    largest = []
    for attempt in range(12):
        delay_s = retry.delay_s(LOST, stable=False)
        assert delay_s is not None
        assert 0.0 <= delay_s <= min(60.0, 2.0 ** (attempt + 1))
        largest.append(delay_s)
    for _ in range(100):
        delay_s = retry.delay_s(LOST, stable=False)
        assert delay_s is not None
        largest.append(delay_s)
    assert len(set(largest)) > 100
    assert max(largest) > 30.0
    delay_s = retry.delay_s(LOST, stable=True)
    assert delay_s is not None
    assert delay_s <= 1.0
