"""Which parts of the weights have directions of their own, and which of them a device gets in a round.

The survivors are cut into blocks of neighbours. A block is either probed (a scalar is a difference of losses along a
direction) or sketched (a scalar is a coordinate of a gradient that the device holds). Every side derives the same
blocks and positions from the run's settings, the artifact, the mask and the length of the log: nothing of it travels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..artifact.node_stages import noisy_stages
from ..artifact.stages import local_stages
from ..errors import ConfigError
from ..pruning.mask import Mask
from ..settings import LOCAL_ESTIMATORS, Assignment, TrainingSettings
from ..wire.framing import MAX_SCALARS
from .directions import MAX_BLOCKS, MAX_POSITION, Directions, Family, n_positions
from .ranking import CoordinateRanking

__all__ = ["Block", "BlockKind", "Deal", "blocks_of", "deal", "directions_of", "sketch_k", "whole_block"]

BlockKind = Literal["probe", "sketch"]


@dataclass(frozen=True, slots=True)
class Block:
    """One part of the weights.

    Attributes:
        number: From 0; tells the streams of its directions.
        first: Its first survivor.
        size: Number of survivors.
        kind: ``probe`` or ``sketch``.
        family: Of its directions; ``ranked`` for those of a sketch, which are coordinates.
        k: Positions a device gets in a round, if that many fit.
    """

    number: int
    first: int
    size: int
    kind: BlockKind
    family: Family | Literal["ranked"]
    k: int

    @property
    def n_positions(self) -> int:
        """After how many positions its directions repeat."""
        return self.size if self.family == "ranked" else n_positions(self.family, self.size)

    @property
    def offset(self) -> int:
        """Its position 0 on the axis that all blocks share, as update records count."""
        return self.number * MAX_POSITION


@dataclass(frozen=True, slots=True)
class Deal:
    """The positions of one block that a round hands out.

    Attributes:
        block: The block.
        k: Positions a device.
        n_slots: Disjoint runs of ``k`` positions; 1 if all devices get the same.
        step: Updates before the round.
        reach: The largest ``k`` that a round may have: the rounds' first positions lie that far apart, so that no
            round repeats what its neighbours have, whatever their ``k``.
        starts: Where every slot begins behind the first position, and where the last one ends, if some devices have
            fewer than ``k``; else empty.
    """

    block: Block
    k: int
    n_slots: int
    step: int
    reach: int = 0
    starts: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """First position of the round; with one ``k`` for all, rounds follow each other while the devices stay.

        Positions of a sketch are places among the coordinates of the round, which the ranking tells.
        """
        if self.block.kind == "sketch":
            return 0
        return self.step * self.n_slots * max(self.k, self.reach) % self.block.n_positions

    def slot(self, rank: int) -> int:
        """Which run the device of that rank gets: another one each round, so that it meets all parts of the basis."""
        return (rank + self.step) % self.n_slots

    def start(self, slot: int) -> int:
        """The first position of a slot."""
        return self.first + (self.starts[slot] if self.starts else slot * self.k)

    def size(self, slot: int) -> int:
        """Positions of a slot."""
        return self.starts[slot + 1] - self.starts[slot] if self.starts else self.k

    def positions(self, slot: int) -> NDArray[np.int64]:
        """The positions of one slot: ``int64[size]``, ascending."""
        first = self.start(slot)
        return np.arange(first, first + self.size(slot), dtype=np.int64)


def blocks_of(training: TrainingSettings, manifest: Manifest, mask: Mask) -> tuple[Block, ...]:
    """The blocks of a run, in the order of the weights.

    Args:
        training: Names the estimator.
        manifest: Tells where the network is cut.
        mask: Tells how many survivors lie in front of the cut.

    Raises:
        ConfigError: The artifact lacks what the estimator needs, or has heads that it does not train.
    """
    n, family = mask.n_survivors, training.directions
    if training.estimator in LOCAL_ESTIMATORS:
        return _local_blocks(training, manifest, mask)
    if manifest.learns_locally:
        raise ConfigError(
            f"the artifact of {manifest.model} has local heads, the estimator {training.estimator} does not train them",
            hint="use --estimator local or local-node, or export without --local-heads",
        )
    if training.estimator == "stein":
        return whole_block(family, n, training.k)
    if training.estimator == "coordinate":
        return (Block(0, 0, n, "sketch", "ranked", training.k),)
    if training.estimator == "split" and manifest.sections is not None:
        sizes = manifest.sections.sizes(mask.counts().tolist())
        dealt = manifest.sections.dealt(training.tail_k, sizes, training.local_steps)
        return tuple(
            Block(number, sum(sizes[:number]), size, "probe", family, k)
            for number, (size, k) in enumerate(zip(sizes, (training.k, *dealt), strict=True))
        )
    cut = manifest.cut if training.estimator == "split" else manifest.tail.cut if manifest.tail else None
    if cut is None:
        layers = (
            "layers that can be separated" if training.estimator == "split" else "fully connected layers at its end"
        )
        raise ConfigError(
            f"the estimator {training.estimator} needs {layers}, {manifest.model} has none",
            hint="use --estimator stein",
        )
    is_split, noisy = training.estimator == "split", noisy_stages(manifest)
    first_parameter = noisy[0].first_parameter if noisy and not is_split else cut.first_parameter
    first = int(mask.counts()[:first_parameter].sum())
    front = Block(0, 0, first, "probe", family, training.k)
    if is_split:
        return front, Block(1, first, n - first, "probe", family, training.tail_k)
    return front, Block(1, first, n - first, "sketch", "ranked", training.tail_k)


def _local_blocks(training: TrainingSettings, manifest: Manifest, mask: Mask) -> tuple[Block, ...]:
    """A sketch of every stage and one of all heads, which lie behind the stages.

    Neighbours of a network of more stages share a sketch, so that there are at most :data:`~.directions.MAX_BLOCKS`.
    They share ``tail_k`` scalars in proportion to the square root of their survivors, so that a block of a hundred
    times as many weights gets ten times as many scalars.
    """
    if not manifest.learns_locally:
        raise ConfigError(
            f"the estimator {training.estimator} needs local heads, the artifact of {manifest.model} has none",
            hint="export it with --local-heads; a network with shortcuts or normalisation cannot have them",
        )
    stages, counts = local_stages(manifest.stages), mask.counts()
    sizes = [int(counts[stage.first_parameter : stage.end_parameter].sum()) for stage in stages]
    of_heads = [n] if (n := mask.n_survivors - sum(sizes)) else []
    most = MAX_BLOCKS - len(of_heads)
    if len(sizes) > most:
        sizes = [sum(sizes[len(sizes) * i // most : len(sizes) * (i + 1) // most]) for i in range(most)]
    sizes += of_heads
    roots = [math.sqrt(size) for size in sizes]
    blocks: list[Block] = []
    for number, (size, root) in enumerate(zip(sizes, roots, strict=True)):
        # Correctly rounded: the sum of Python 3.12 differs from older ones in the last bit.
        k = max(1, round(training.tail_k * root / math.fsum(roots)))
        blocks.append(Block(number, sum(sizes[:number]), size, "sketch", "ranked", k))
    return tuple(blocks)


def whole_block(family: Family, n_survivors: int, k: int = 1) -> tuple[Block, ...]:
    """All weights as one block that is probed."""
    return (Block(0, 0, n_survivors, "probe", family, k),)


def sketch_k(block: Block, n_blocks: int, n_rounds: int = 1) -> int:
    """Coordinates that a round has of a sketched block.

    Args:
        block: The block.
        n_blocks: Of the run.
        n_rounds: See :func:`deal`.
    """
    return min(block.k, max(1, min(block.n_positions, MAX_SCALARS // (n_blocks * n_rounds))))


def deal(
    blocks: Sequence[Block],
    assignment: Assignment,
    step: int,
    n_devices: int,
    k: int = 0,
    k_max: int = 0,
    n_rounds: int = 1,
    k_min: int = 0,
    levels: Sequence[int] = (),
) -> tuple[Deal, ...]:
    """What a round hands out, so that whoever reports, the update fits one message.

    Args:
        blocks: Of the run.
        assignment: Of probed blocks; sketches are always shared, so that their scalars can be added.
        step: Updates before the round.
        n_devices: Participants, at least 1.
        k: Positions of the first block that the round was announced with, 0 for the settings' number; the other probed
            blocks get as many times more, sketches always the same.
        k_max: The settings' largest ``k``; 0 if it never changes.
        n_rounds: Rounds whose scalars one update may hold: this one, and those of which late reports still count.
        k_min: The least that a slow device gets of the first block.
        levels: By rank, how often the positions of a device are halved; empty for never. Of dealt directions only.
    """
    slots = {b.number: n_devices if assignment == "dealt" and b.kind == "probe" else 1 for b in blocks}
    room = MAX_SCALARS // (len(blocks) * n_rounds)
    deals = []
    least = blocks[0].k
    most = max(least, k_max)
    for block in blocks:
        n_slots = slots[block.number]
        limit = max(1, min(block.n_positions // n_slots, room // n_slots))
        wanted, reach = (
            (block.k * now // least if block.kind == "probe" else block.k) for now in (min(max(k, least), most), most)
        )
        share = min(wanted, limit)
        starts: tuple[int, ...] = ()
        if levels and n_slots > 1:
            floor = max(1, min(share, block.k * k_min // least))
            starts = _starts([max(floor, share >> levels[(slot - step) % n_slots]) for slot in range(n_slots)])
        deals.append(Deal(block, share, n_slots, step, min(reach, limit), starts))
    return tuple(deals)


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return (0, *accumulate(sizes))


def directions_of(blocks: Sequence[Block], seed: int) -> tuple[Directions | CoordinateRanking, ...]:
    """The directions of every block, of a run with that seed; of a sketch the ranking of its coordinates."""
    return tuple(
        CoordinateRanking(seed, block.size, block.number)
        if block.family == "ranked"
        else Directions(block.family, seed, block.size, block.number)
        for block in blocks
    )
