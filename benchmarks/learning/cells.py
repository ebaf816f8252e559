"""The table: which method runs on which data, under which mask, in which world, for how long, from which seed."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedzo.protocol.errors import ConfigError

from .settings import BUDGETS, resolved

__all__ = ["TARGETS", "Cell", "selected", "table"]

TARGETS = {"digits": "1m5", "fashion_mnist": "3m", "cifar10": "3m", "cifar100": "3m"}
_DATA = ("digits", "fashion_mnist", "cifar10")
_LONG = "30m"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: Name of the data set.
        method: Name in :data:`~.settings.METHODS`.
        mask: Name in :data:`~.settings.MASKS`.
        world: Name in :data:`~.settings.WORLDS`.
        budget: Name in :data:`~.settings.BUDGETS`.
        seed: Of initial weights, directions, batches, and of who holds which samples.
        scale: What the budget is multiplied with.
        part: ``test``, or ``validation`` to train without and measure on a part of the training set.
        settings: See :func:`~.settings.resolved`.
    """

    data: str
    method: str
    mask: str
    world: str
    budget: str
    seed: int
    scale: float = 1.0
    part: str = "test"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """What has settings of its own."""
        return f"{self.data}/{self.method}/{self.mask}/{self.world}"

    @property
    def key(self) -> str:
        """Name of the cell."""
        return f"{self.group}/{self.budget}/{self.seed}"

    @property
    def budget_sf(self) -> float:
        """Sample-forwards to spend."""
        return BUDGETS[self.budget] * self.scale

    def is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is the result of exactly this run."""
        mine = dataclasses.asdict(self)
        return all(row.get(name) == value for name, value in mine.items())


def table(seeds: Sequence[int], changes: Mapping[str, Any] | None = None, scale: float = 1.0) -> list[Cell]:
    """All cells of the benchmark, the most wanted first."""
    named = [(tier, seed, names) for seed in seeds for tier, names in _names()]
    named.sort(key=lambda entry: entry[:2])
    return [
        Cell(data, method, mask, world, budget, seed, scale, "test", resolved(data, method, mask, world, changes))
        for _, seed, (data, method, mask, world, budget) in named
    ]


def _names() -> Iterator[tuple[int, tuple[str, str, str, str, str]]]:
    """Tier, and the names of a cell without its seed."""
    for data in _DATA:
        target = TARGETS[data]
        for method in ("baseline", "ours", "local", "backprop"):
            yield 0, (data, method, "dense", "main", target)
        # Short runs with a schedule of their own: how early ours is where the baseline ends.
        for budget in ("60k", "150k", "300k"):
            yield 1, (data, "ours", "dense", "main", budget)
        for method in ("ours", "local"):
            yield 2, (data, method, "pruned80", "main", target)
            for world in ("iid50", "dirichlet01"):
                yield 2, (data, method, "dense", world, target)
        other = "3m" if target == "1m5" else "1m5"
        for method in ("baseline", "ours", "local", "backprop"):
            yield 3, (data, method, "dense", "main", other)
    for data in ("cifar10", "fashion_mnist", "digits"):
        for method in ("local", "ours", "backprop", "baseline"):
            yield 4 if data == "cifar10" else 5, (data, method, "dense", "main", _LONG)


def selected(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose keys match one of the patterns, in the order of the table.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    if not patterns:
        return list(cells)
    chosen = []
    for pattern in patterns:
        matching = [cell for cell in cells if fnmatch.fnmatchcase(cell.key, f"*{pattern}*")]
        if not matching:
            keys = ", ".join(sorted({cell.group for cell in cells})[:4])
            raise ConfigError(f"no cell matches {pattern!r}", hint=f"keys look like {keys}/3m/0; --list prints them")
        chosen += matching
    return [cell for cell in cells if cell in chosen]
