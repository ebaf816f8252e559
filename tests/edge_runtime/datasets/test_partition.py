"""Splits over simulated devices: complete, disjoint, seeded, skewed as asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.partition import partition_dirichlet, partition_iid, partition_shards
from fedzo.protocol.errors import ConfigError

LABELS = np.repeat(np.arange(10, dtype=np.int64), 60)[np.argsort(np.arange(600) * 7919 % 600)]

SPLITS = {
    "iid": lambda seed: partition_iid(len(LABELS), 7, seed),
    "shards": lambda seed: partition_shards(LABELS, 7, seed),
    "dirichlet": lambda seed: partition_dirichlet(LABELS, 7, 0.3, seed),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_are_complete_disjoint_sorted_and_seeded(name: str) -> None:
    parts = SPLITS[name](3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert [p.tolist() for p in parts] == [p.tolist() for p in SPLITS[name](3)]
    assert [p.tolist() for p in parts] != [p.tolist() for p in SPLITS[name](4)]


def _skew(parts: list[Any]) -> float:
    """Mean over devices of the share of the commonest label."""
    return float(np.mean([np.bincount(LABELS[p], minlength=10).max() / len(p) for p in parts]))


def test_iid_is_even_and_shards_see_few_labels() -> None:
    assert {len(p) for p in SPLITS["iid"](1)} == {85, 86}
    assert max(len(np.unique(LABELS[p])) for p in partition_shards(LABELS, 10, 1)) <= 4


def test_alpha_orders_the_skew() -> None:
    skews = [_skew(partition_dirichlet(LABELS, 7, alpha, 1)) for alpha in (0.05, 0.5, 5.0, 1e4)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.13


def test_dirichlet_proportions_have_the_right_variance() -> None:
    """Share of a label that one of n devices gets: mean 1/n, variance (n-1) / (n^2 (n alpha + 1))."""
    labels = np.zeros(1000, np.int64)
    n, alpha = 4, 0.8
    shares = [
        len(part) / 1000 for seed in range(400) for part in partition_dirichlet(labels, n, alpha, seed, smallest=0)
    ]
    assert np.mean(shares) == pytest.approx(1 / n)
    assert np.var(shares) == pytest.approx((n - 1) / (n**2 * (n * alpha + 1)), rel=0.1)


def test_smallest_part_is_kept() -> None:
    parts = partition_dirichlet(LABELS, 7, 0.1, 2, smallest=20)
    assert min(map(len, parts)) >= 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: partition_iid(3, 4, 0),
        lambda: partition_iid(3, 0, 0),
        lambda: partition_shards(LABELS[:9], 5, 0),
        lambda: partition_dirichlet(LABELS, 7, 0.0, 0),
        lambda: partition_dirichlet(LABELS, 7, float("nan"), 0),
        lambda: partition_dirichlet(LABELS, 7, 1e-3, 0, smallest=80),
    ],
)
def test_impossible_splits_are_refused(call: Any) -> None:
    with pytest.raises(ConfigError):
        call()
