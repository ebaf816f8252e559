"""Digests that every side compares: of weights, and of the log that led to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import Layout
from ..perturbation.blocks import Block
from ..pruning.mask import Mask
from ..wire.framing import DIGEST_BYTES
from .optimisers import OptimiserConfig

__all__ = ["chain_digest", "empty_log_digest", "weights_digest"]


def weights_digest(weights: NDArray[np.float32]) -> bytes:
    """First 16 bytes of the SHA-256 of the little-endian ``float32`` values."""
    return hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).digest()[:DIGEST_BYTES]


def chain_digest(parent: bytes, record: bytes) -> bytes:
    """Head of the log after ``record``, its encoded bytes, was appended to the log with head ``parent``."""
    return hashlib.sha256(parent + record).digest()[:DIGEST_BYTES]


def empty_log_digest(
    layout: Layout,
    mask: Mask,
    manifest_seed: int,
    run_seed: int,
    blocks: Sequence[Block],
    optimiser: OptimiserConfig,
    staleness: int = 0,
) -> bytes:
    """Head of a log without records. It covers every setting of the replay, so that two sides whose settings differ
    disagree from the first record on instead of drifting apart.

    Returns:
        16 bytes.
    """
    settings = {
        "format": 3,
        "layout": layout.digest.hex(),
        "mask": mask.digest.hex(),
        "fill": mask.fill,
        "manifest_seed": manifest_seed,
        "run_seed": run_seed,
        "blocks": [[b.number, b.first, b.size, b.kind, b.family] for b in blocks],
        "optimiser": optimiser.to_json(),
    }
    if staleness:
        settings["staleness"] = staleness
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]
