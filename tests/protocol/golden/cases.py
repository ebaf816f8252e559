"""Computes every golden vector. Run as a module it prints them as JSON, under whatever numpy it finds.

Needs numpy and fedzo.protocol only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.artifact.layout import Layout, initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.perturbation.blocks import Block, deal, whole_block
from fedzo.protocol.perturbation.directions import FAMILIES, Directions, Family, fwht, round_coefficients
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, permutation, raw_bytes, uint16s, uint64s
from fedzo.protocol.pruning.layer_densities import erk_densities
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs, layer_draw
from fedzo.protocol.replay.optimisers import OPTIMISERS, Optimiser, OptimiserConfig, OptimiserName
from fedzo.protocol.replay.update import Replica, weights_digest
from fedzo.protocol.settings import Assignment
from tests.protocol.builders import (
    one_parameter,
    seeded_coefficients,
    seeded_normals,
    small_layout,
    small_manifest,
)

Json = Any
REPLAY_UPDATES = 1_000
# (name, family, optimiser, survivors, positions an update). The sizes are no powers of two.
REPLAYS: tuple[tuple[str, Family, OptimiserName, int, int], ...] = (
    ("gaussian+adam", "gaussian", "adam", 2_003, 4),
    ("rademacher+sign_momentum", "rademacher", "sign_momentum", 2_003, 4),
    ("hadamard+adam", "hadamard", "adam", 12_402, 24),
    ("hadamard+momentum", "hadamard", "momentum", 3_001, 24),
    ("hadamard+sgd", "hadamard", "sgd", 2_003, 24),
)

# (name, blocks, positions of a block an update).
BLOCK_REPLAYS: tuple[tuple[str, tuple[Block, ...], int], ...] = (
    (
        "split+hadamard",
        (Block(0, 0, 1_203, "probe", "hadamard", 16), Block(1, 1_203, 800, "probe", "hadamard", 64)),
        24,
    ),
    ("node+rademacher", (Block(0, 0, 503, "probe", "rademacher", 4), Block(1, 503, 1_500, "sketch", "ranked", 9)), 4),
)


def sha256(array: NDArray[Any]) -> str:
    """Digest of the little-endian bytes of an array."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def replay_layout(survivors: int) -> tuple[Layout, Mask]:
    """A layout with a mask that keeps ``survivors`` of twice as many entries."""
    layout = one_parameter(2 * survivors)
    return layout, threshold(layout, np.abs(initial_weights(layout, 1)), 0.5)


def replay(
    family: Family, optimiser: OptimiserName, survivors: int, positions: int, updates: int = REPLAY_UPDATES
) -> Replica:
    """A replica after ``updates`` seeded updates, two segments each, with weight decay."""
    return replay_blocks(whole_block(family, survivors), optimiser, positions, updates)


def replay_blocks(
    blocks: tuple[Block, ...],
    optimiser: OptimiserName,
    positions: int,
    updates: int = REPLAY_UPDATES,
    **constants: float,
) -> Replica:
    """The same with two segments of each block that is probed."""
    layout, mask = replay_layout(sum(block.size for block in blocks))
    replica = Replica(layout, mask, 1, 2, blocks, OptimiserConfig(optimiser, weight_decay=0.01, **constants))
    split = positions // 3
    for index in range(updates):
        segments: list[tuple[int, int]] = []
        for block in blocks:
            if block.kind == "sketch":
                segments.append((block.offset, positions))
                continue
            first = block.offset + index * (positions + 1) % (block.n_positions - positions - 1)
            segments += [(first, split), (first + split + 1, positions - split)]
        rate = float(np.float32(0.01) / np.float32(1 + index // 100))
        coefficients = seeded_coefficients(3, index, positions * len(blocks))
        replica.prepare(index, index, rate, tuple(segments), coefficients)
    return replica


def streams() -> Json:
    """Raw words, halves and bytes, and a permutation."""
    return {
        "uint64s": [int(v) for v in uint64s(1, Purpose.DIRECTION, 2, 3, 4)],
        "uint64s large words": [int(v) for v in uint64s(2**64 - 1, Purpose.GOLDEN, 2**63 + 1, 2**64 - 2, 2)],
        "uint16s": [int(v) for v in uint16s(1, Purpose.DIRECTION, 2, 3, 6)],
        "raw_bytes": raw_bytes(1, Purpose.DIRECTION, 2, 3, 9).tobytes().hex(),
        "million": sha256(uint64s(7, Purpose.INIT, 0, 0, 1_000_000)),
        "permutation": [int(v) for v in permutation(5, Purpose.ROWS, 0, 0, 16)],
        "permutation 16384": sha256(permutation(5, Purpose.ROWS, 0, 0, 16_384)),
    }


def table() -> Json:
    """The Gaussian table."""
    values = gaussian_table()
    return {"sha256": sha256(values), "first": float(values[0]), "middle": float(values[32_768])}


def directions() -> Json:
    """One direction and one combination of each family, at a size that is no power of two."""
    out: dict[str, Json] = {}
    for family in FAMILIES:
        source = Directions(family, 9, 5_001)
        buffer = np.empty(source.size, dtype=np.float32)
        positions = np.concatenate([np.arange(40), np.arange(100, 160), np.arange(8_190, 8_200)]).astype(np.int64)
        out[family] = {
            "head": [float(v) for v in source.direction(4, 17, buffer)[:6]],
            "direction": sha256(buffer),
            "combine": sha256(source.combine(4, positions, seeded_coefficients(6, 0, positions.size))),
        }
    out["fwht"] = {"4096": sha256(fwht(seeded_normals(1, 0, 4_096))), "64": sha256(fwht(seeded_normals(1, 1, 64)))}
    rounded = round_coefficients(np.array([1.0 / 3.0, -1e-3, 12345.678, 1e-31, -7.0]))
    out["round_coefficients"] = {"values": [float(v) for v in rounded]}
    return out


def layouts() -> Json:
    """Layout digest, initial weights and the golden batch."""
    x, y = golden_batch((2, 3), 5, 7, 4)
    return {
        "digest": small_layout().digest.hex(),
        "initial_weights": sha256(initial_weights(small_layout(), 11)),
        "initial_weights head": [float(v) for v in initial_weights(small_layout(), 11)[:4]],
        "golden_batch": [sha256(x), [int(v) for v in y]],
    }


def masks() -> Json:
    """A mask from scores: its digest, feeds and header. The compressed body may differ between zlib builds."""
    layout = small_layout()
    mask = threshold(layout, np.abs(initial_weights(layout, 11)), 0.7)
    return {
        "digest": mask.digest.hex(),
        "index": sha256(mask.index()),
        "counts": [int(v) for v in mask.counts()],
        "header": mask.encode()[:24].hex(),
        "bits": base64.b64encode(np.packbits(mask.kept, bitorder="little").tobytes()).decode(),
        "drawn": erk_densities(layout, 0.7, 5).encode().hex(),
    }


def optimisers() -> Json:
    """Weights and state of each optimiser after 50 seeded steps."""
    out = {}
    for name in OPTIMISERS:
        optimiser = Optimiser(OptimiserConfig(name, weight_decay=0.1), 777)
        weights = seeded_normals(2, 0, 777)
        for step in range(50):
            optimiser.step(weights, seeded_normals(2, 1 + step, 777), np.float32(0.01))
        out[name] = [weights_digest(weights).hex(), *(sha256(part) for part in optimiser.state)]
    return out


def saliency() -> Json:
    """Scores with and without layer totals, inputs and a whole-layer draw."""
    manifest = small_manifest()
    weights = initial_weights(manifest.layout, manifest.seed)
    sensitivities = np.abs(seeded_normals(4, 0, manifest.n_units))
    moments = np.abs(seeded_normals(4, 1, manifest.n_moments))
    totals = np.array([2.0, 0.5], dtype=np.float32)
    return {
        "scores": sha256(diagonal_scores(manifest, weights, sensitivities, moments)),
        "scores with totals": sha256(diagonal_scores(manifest, weights, sensitivities, moments, totals)),
        "gaussian_inputs": sha256(gaussian_inputs(manifest, 1, 2, 3, 4)),
        "layer_draw": sha256(layer_draw(manifest, 1, 2, 0, 3)),
    }


def replays() -> Json:
    """Weights digest and log head after 1,000 updates."""
    out = {}
    for name, family, optimiser, survivors, positions in REPLAYS:
        replica = replay(family, optimiser, survivors, positions)
        out[name] = [replica.digest.hex(), replica.head.hex()]
    for name, blocks, positions in BLOCK_REPLAYS:
        replica = replay_blocks(blocks, "adam", positions)
        out[name] = [replica.digest.hex(), replica.head.hex()]
    averaged: tuple[OptimiserName, ...] = ("adam", "sgd")
    for optimiser in averaged:
        replica = replay_blocks(BLOCK_REPLAYS[0][1], optimiser, 4, 200, front_rate=0.3, ema=0.98)
        out[f"average+front+{optimiser}"] = [replica.digest.hex(), replica.evaluated()[1].hex(), replica.head.hex()]
    return out


def deals() -> Json:
    """What some rounds hand out: directions a device, slots, first position, and the slots of the first two devices."""
    out: dict[str, Json] = {}
    for assignment in get_args(Assignment):
        for step, n_devices in ((0, 1), (5, 3), (70_000, 7), (2**32 - 1, 11_000)):
            dealt = deal(BLOCK_REPLAYS[0][1], assignment, step, n_devices)
            out[f"{assignment} {step} {n_devices}"] = [
                f"{one.k} of {one.n_slots} from {one.block.offset + one.first}, slots {one.slot(0)} {one.slot(1)}"
                for one in dealt
            ]
    for k, k_max in ((0, 40), (16, 40), (29, 40), (99, 40)):
        out[f"dealt 5 3, {k} of {k_max}"] = [
            f"{one.k} of {one.n_slots} from {one.block.offset + one.first}"
            for blocks in BLOCK_REPLAYS
            for one in deal(blocks[1], "dealt", 5, 3, k=k, k_max=k_max)
        ]
    return out


CASES: dict[str, Callable[[], Json]] = {
    "streams": streams,
    "table": table,
    "directions": directions,
    "layouts": layouts,
    "masks": masks,
    "optimisers": optimisers,
    "saliency": saliency,
    "replays": replays,
    "deals": deals,
}


def compute() -> Json:
    """All golden vectors as plain data."""
    return {name: case() for name, case in CASES.items()}


if __name__ == "__main__":
    print(json.dumps(compute(), indent=1))  # noqa: T201
