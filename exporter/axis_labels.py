"""Labels of the entries along an axis: which are equal, and which may not be removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["AxisLabels", "Labels", "merged", "split"]

Labels = NDArray[np.int64]
"""``int64[n]``, one label an entry; 0 is an entry that never can be removed."""


class AxisLabels:
    """Union-find over labels, with reasons for those that are pinned."""

    def __init__(self) -> None:
        self._parents: list[int] = [0]
        self._pinned: list[tuple[Labels, str]] = []

    def fresh(self, size: int) -> Labels:
        """New labels, equal to no others: ``int64[size]``."""
        start = len(self._parents)
        self._parents.extend(range(start, start + size))
        return np.arange(start, start + size, dtype=np.int64)

    def root(self, label: int) -> int:
        """The label that stands for all that are equal to ``label``."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        """:meth:`root` of each."""
        return np.array([self.root(int(label)) for label in labels], np.int64)

    def tie(self, a: Labels, b: Labels, reason: str) -> None:
        """Make ``a[k]`` equal to ``b[k]``; what meets 0 is pinned for ``reason``, and so are axes of unequal size."""
        if len(a) != len(b):
            self.pin(a, reason)
            self.pin(b, reason)
            return
        self.pin(a[b == 0], reason)
        self.pin(b[a == 0], reason)
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            if x and y:
                first, second = sorted((self.root(x), self.root(y)))
                self._parents[second] = first

    def pin(self, labels: Labels, reason: str) -> None:
        """Never remove these."""
        if labels.any():
            self._pinned.append((labels[labels > 0], reason))

    def pinned(self) -> dict[int, str]:
        """Roots that are pinned, with the first reason."""
        found: dict[int, str] = {0: ""}
        for labels, reason in self._pinned:
            for label in labels.tolist():
                found.setdefault(self.root(label), reason)
        return found


def merged(labels: AxisLabels, axes: Sequence[Labels], reason: str) -> Labels:
    """Labels of several axes as one, in C order; only one of them can carry any, else all are pinned."""
    sizes = [len(axis) for axis in axes]
    carrying = [k for k, axis in enumerate(axes) if axis.any()]
    if len(carrying) > 1:
        for axis in axes:
            labels.pin(axis, reason)
    if len(carrying) != 1:
        return np.zeros(math.prod(sizes), np.int64)
    shape = [size if k == carrying[0] else 1 for k, size in enumerate(sizes)]
    return np.ascontiguousarray(np.broadcast_to(axes[carrying[0]].reshape(shape), sizes)).reshape(-1)


def split(labels: AxisLabels, block: Labels, sizes: Sequence[int], reason: str) -> list[Labels | None]:
    """Labels of one axis as several: one of them must carry all, else they are pinned."""
    out: list[Labels | None] = [np.zeros(size, np.int64) for size in sizes]
    if not block.any():
        return out
    roots = np.where(block > 0, labels.roots(block), 0).reshape(tuple(sizes))
    for axis in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        others = tuple(k for k in range(len(sizes)) if k != axis)
        if (roots == roots.max(axis=others, keepdims=True)).all():
            first = np.moveaxis(block.reshape(tuple(sizes)), axis, 0).reshape(sizes[axis], -1)[:, 0]
            out[axis] = np.ascontiguousarray(first)
            return out
    labels.pin(block, reason)
    return out
