"""Settings of every method, as flat dictionaries that go into the rows.

Names are fields of :class:`~fedzo.protocol.settings.TrainingSettings`; ``optimiser.``, ``saliency.`` and ``run.`` in
front of a name mean the optimiser, the saliency and the run itself. ``devices`` and ``participants`` are the world;
``local_heads`` is the artifact's. What the search on the validation split found stands in ``found.json`` beside this
file, and comes last: ``search.py --adopt`` writes it.

``baseline`` is BAFFLE's form (arXiv 2301.12195): Gaussian directions of the whole dense network, forward differences
with one clean loss, Adam with its constants (0.9, 0.99) at the server. Its clipping of the gradient, its augmentation
and its weight decay are left out, and K, batch and rate are those that learn most here, not the paper's.
``decomfl`` is DeComFL's (arXiv 2405.15861): the same few directions on every device, plain SGD.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedzo.protocol.errors import ConfigError

__all__ = ["BUDGETS", "FOUND", "MASKS", "METHODS", "TORCH", "WORLDS", "resolved"]

FOUND = Path(__file__).with_name("found.json")
BUDGETS = {"60k": 60e3, "150k": 150e3, "300k": 300e3, "600k": 600e3, "1m5": 1.5e6, "3m": 3e6, "6m": 6e6, "30m": 30e6}
MASKS = {"dense": 0.0, "pruned80": 0.8, "pruned90": 0.9}
TORCH = ("backprop", "fedavg")  # not ours: torch, with gradients

Settings = dict[str, Any]

_STEIN: Settings = {"estimator": "stein", "directions": "gaussian", "k": 50, "batch": 16, "learning_rate": 7e-3}
_NODE: Settings = {
    "estimator": "node",
    "k": 15,
    "probe_batch": 4,
    "sigma": 3e-3,
    "tail_k": 1_920,  # halves: with k, header and topic a report stays below 4,096 bytes
    "repeats": 16,
    "feedback": 0.95,
    "batch": 32,
    "learning_rate": 4e-3,
}
METHODS: dict[str, Settings] = {
    "baseline": {**_STEIN, "sigma": 1e-3},
    "decomfl": {**_STEIN, "assignment": "shared", "k": 10, "optimiser.name": "sgd", "learning_rate": 1e-3},
    "ours": _NODE,
    "split": {"estimator": "split", "k": 10, "tail_k": 100, "batch": 16, "learning_rate": 3e-3},
    "local": {**_NODE, "estimator": "local", "k": 1, "local_heads": True, "batch": 64, "learning_rate": 5e-3},
    "local-node": {**_NODE, "estimator": "local-node", "k": 1, "local_heads": True, "learning_rate": 3e-3},
    "backprop": {"batch": 64, "learning_rate": 1e-3},
    "fedavg": {"batch": 32, "sgd_steps": 10, "learning_rate": 5e-2},
}
WORLDS: dict[str, Settings] = {
    "main": {"split": "iid", "devices": 1, "participants": 0},
    "iid50": {"split": "iid", "devices": 50, "participants": 16},
    "dirichlet01": {"split": "dirichlet:0.1", "devices": 50, "participants": 16},
}
_MANY: dict[str, Settings] = {  # sixteen devices a round: each does less
    "baseline": {"k": 10},
    "decomfl": {"k": 10},
    "ours": {"k": 3, "batch": 8, "feedback": 0.5},  # what a board could not send is old when its turn comes again
    "split": {"k": 4, "tail_k": 32},
    "local": {"batch": 8},
    "local-node": {"batch": 8},
}
_PRUNED: Settings = {"saliency.samples": 64}
_PRUNED_MANY: Settings = {"saliency.samples": 4}  # of each of 50 devices: 200 samples in all


def resolved(data: str, method: str, mask: str, world: str, changes: Mapping[str, Any] | None = None) -> Settings:
    """All settings of one cell.

    What was found for exactly this cell counts before what was found for its data, method and mask in the main world.

    Args:
        data: Name of the data set.
        method: One of :data:`METHODS`.
        mask: One of :data:`MASKS`.
        world: One of :data:`WORLDS`.
        changes: From the command line; ``method.name`` changes one method alone.

    Raises:
        ConfigError: There is no such method, mask or world.
    """
    for name, value, known in (("method", method, METHODS), ("mask", mask, MASKS), ("world", world, WORLDS)):
        if value not in known:
            raise ConfigError(f"the {name} {value!r} is none of {', '.join(known)}")
    settings = {**WORLDS[world], **METHODS[method]}
    if world != "main":
        settings |= _MANY.get(method, {})
    if mask != "dense":
        settings |= _PRUNED if world == "main" else _PRUNED_MANY
    found = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
    many = world != "main"
    for key in (
        f"{data}/{method}/dense/main",
        *([f"{data}/{method}/{mask}/main"] if mask != "dense" else []),
        *([f"{data}/{method}/dense/iid50", f"{data}/{method}/{mask}/iid50"] if many else []),
        f"{data}/{method}/{mask}/{world}",
    ):
        settings |= found.get(key, {})
    for name, value in (changes or {}).items():
        owner, _, rest = name.partition(".")
        if owner not in METHODS:
            settings[name] = value
        elif owner == method:
            settings[rest] = value
    return settings
