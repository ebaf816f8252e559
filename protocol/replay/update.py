"""From scalars to weights: every side replays the same log of updates and reaches the same bits.

An update names positions of the walks over the directions of its blocks and one coefficient each; the gradient estimate
of a block is ``sum_k c_k direction_k`` over its positions, and one optimiser step follows. Weights do not travel,
unless an operator allows snapshots (``server_side/catch_up.py``).

Source: Zelikman et al., "Just One Byte (per gradient)", 2023, and Malladi et al., NeurIPS 2023, for the replay of
scalars with seeds.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import Layout, initial_weights
from ..errors import ProtocolError
from ..perturbation.blocks import Block, directions_of, sketch_k
from ..perturbation.directions import MAX_POSITION, Directions, round_coefficients
from ..perturbation.ranking import CoordinateRanking
from ..pruning.mask import Mask
from ..wire.framing import DIGEST_BYTES
from ..wire.messages import UpdateRecord
from .log_digests import chain_digest, empty_log_digest, weights_digest
from .moving_average import MovingAverage
from .optimisers import Optimiser, OptimiserConfig, n_states
from .past_rounds import PastRound, PastRounds

__all__ = [
    "DIGEST_BYTES",
    "Replica",
    "chain_digest",
    "empty_log_digest",
    "estimate_gradient",
    "largest_snapshot",
    "snapshot_place",
    "weights_digest",
]

_SNAPSHOT = struct.Struct("<4sII16s16s16s")
_SNAPSHOT_MAGIC = b"FZS1"
_NOTHING = PastRounds(0, ())


def estimate_gradient(
    blocks: Sequence[Block],
    directions: Sequence[Directions | CoordinateRanking],
    record: UpdateRecord,
    past: PastRounds = _NOTHING,
) -> NDArray[np.float32]:
    """Sum of coefficient times direction over the positions of every block; zeros where a block has none.

    What is of one age is summed by itself; the sums are added in the order of ages.

    Args:
        blocks: Of the run, one behind the other.
        directions: Theirs; of a sketched block the ranking after the updates before this one.
        record: The update.
        past: The rounds before this one.

    Returns:
        ``float32[n_survivors]``, owned by the caller.

    Raises:
        ProtocolError: A position belongs to no block, or is older than the rounds that are known.
    """
    positions = record.positions()
    parts, sketch = [], 0
    for block, basis, pieces in zip(blocks, directions, _pieces(blocks, record), strict=True):
        total = None
        for age, (start, stop) in pieces.items():
            mine, coefficients = positions[start:stop] - block.offset, record.coefficients[start:stop]
            if age == 0:
                part = basis.combine(record.round, mine, coefficients)
            elif isinstance(basis, CoordinateRanking):
                part = basis.combine_at(past.at(age).coordinates[sketch], mine, coefficients)
            else:
                part = basis.combine(past.at(age).round, mine, coefficients)
            total = part if total is None else np.add(total, part, out=total)
        sketch += isinstance(basis, CoordinateRanking)
        parts.append(np.zeros(block.size, np.float32) if total is None else total)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pieces(blocks: Sequence[Block], record: UpdateRecord) -> list[dict[int, tuple[int, int]]]:
    """Where the coefficients of each block begin and end, by age."""
    found: list[dict[int, tuple[int, int]]] = [{} for _ in blocks]
    start = 0
    for (first, count), age in zip(record.segments, record.ages or [0] * len(record.segments), strict=True):
        block = first // MAX_POSITION
        if block >= len(blocks):
            raise ProtocolError(f"update {record.index} has coefficients for more than {len(blocks)} blocks")
        found[block][age] = found[block].get(age, (start,))[0], start + count
        start += count
    return found


def snapshot_place(snapshot: bytes) -> tuple[int, bytes]:
    """Records behind a snapshot, and the head of the log there.

    Raises:
        ProtocolError: The bytes are no snapshot.
    """
    if len(snapshot) < _SNAPSHOT.size or not snapshot.startswith(_SNAPSHOT_MAGIC):
        raise ProtocolError(f"{len(snapshot)} bytes are no snapshot")
    _, _, index, _, head, _ = _SNAPSHOT.unpack_from(snapshot)
    return index, head


def largest_snapshot(config: OptimiserConfig, n_survivors: int) -> int:
    """Bytes of a snapshot at most, but for what late scalars add: with a ranking of every weight."""
    return _SNAPSHOT.size + (4 * (1 + n_states(config)) + 8) * n_survivors


class Replica:
    """The weights of a run as one side holds them: the initial weights plus a log of updates.

    A call that raises changes nothing: weights, optimiser state and head are those of before (the step is undone
    from copies, 4 bytes per survivor and array, held only during the call). A device whose update was refused can
    therefore still answer for its old index, or fetch a snapshot. Not thread-safe.

    Args:
        layout: The flat vector.
        mask: Its survivors.
        manifest_seed: Seed of the initial weights.
        run_seed: Seed of the directions.
        blocks: Which parts of the survivors have directions of their own, from the first to the last survivor.
        optimiser_config: The optimiser, over the surviving weights.
        staleness: How many updates ago the round of a scalar may be.

    Attributes:
        weights: ``float32[n_survivors]``, a read-only view that the replica updates in place.
        blocks: The blocks.
    """

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        manifest_seed: int,
        run_seed: int,
        blocks: Sequence[Block],
        optimiser_config: OptimiserConfig,
        staleness: int = 0,
    ) -> None:
        if mask.layout != layout:
            raise ProtocolError("the mask belongs to another layout")
        self.blocks = tuple(blocks)
        ends = list(accumulate(block.size for block in blocks))
        places = list(enumerate([0, *ends[:-1]]))
        if [(b.number, b.first) for b in blocks] != places or ends[-1:] != [mask.n_survivors]:
            raise ProtocolError(f"the blocks do not cover the {mask.n_survivors} survivors")
        self._layout, self._mask, self._manifest_seed = layout, mask, manifest_seed
        self._start = empty_log_digest(layout, mask, manifest_seed, run_seed, blocks, optimiser_config, staleness)
        self._weights = np.empty(mask.n_survivors, dtype=np.float32)
        front = self.blocks[0].size if len(self.blocks) > 1 else 0
        self._optimiser = Optimiser(optimiser_config, mask.n_survivors, front)
        self._average = MovingAverage(optimiser_config.ema, mask.n_survivors) if optimiser_config.ema else None
        self._directions = directions_of(blocks, run_seed)
        self._rankings = tuple(d for d in self._directions if isinstance(d, CoordinateRanking))
        sketched = [sketch_k(block, len(blocks), 1 + staleness) for block in blocks if block.kind == "sketch"]
        self._sketched, self._past = tuple(sketched), PastRounds(staleness, sketched)
        self.weights = self._weights.view()
        self.weights.setflags(write=False)
        self.restore_from_start()

    @property
    def index(self) -> int:
        """Number of records applied, which is the index of the next one."""
        return self._optimiser.steps

    @property
    def digest(self) -> bytes:
        """Digest of the weights, 16 bytes."""
        return self._digest

    @property
    def head(self) -> bytes:
        """Chain digest of the log so far, 16 bytes."""
        return self._head

    def evaluated(self) -> tuple[NDArray[np.float32], bytes]:
        """What evaluations and models take: the average of the weights if the run keeps one, else the weights.

        Returns:
            ``float32[n_survivors]``, owned by the caller, and its digest, 16 bytes.
        """
        if self._average is None or self.index == 0:
            return self._weights.copy(), self._digest
        values = self._average.values()
        return values, weights_digest(values)

    def coordinates(self, block: int, k: int) -> NDArray[np.int64]:
        """Which weights of a sketched block the next update moves: ``int64[k]``, ascending from 0; read-only."""
        ranking = self._directions[block]
        assert isinstance(ranking, CoordinateRanking)
        return ranking.chosen(k)

    def gradient(self, record: UpdateRecord) -> NDArray[np.float32]:
        """:func:`estimate_gradient` of a record of this run; of a sketched block only until the record is applied."""
        return estimate_gradient(self.blocks, self._directions, record, self._past)

    def restore_from_start(self) -> None:
        """Go back to the initial weights and the empty log."""
        np.copyto(self._weights, initial_weights(self._layout, self._manifest_seed)[self._mask.kept])
        for part in self._optimiser.state:
            part.fill(0.0)
        self._optimiser.restore(0, self._optimiser.state)
        if self._average is not None:
            self._average.restore(0)
        for ranking in self._rankings:
            ranking.restart()
        self._past.clear()
        self._digest, self._head = weights_digest(self._weights), self._start

    def apply(self, record: UpdateRecord) -> None:
        """Replay one update.

        Raises:
            ProtocolError: The record is not the next one, its parent is another log, or the weights after it do not
                have its digest. Nothing has changed then.
        """
        self._check_index(record.index)
        if record.parent != self._head:
            raise ProtocolError(
                f"update {record.index} continues the log {record.parent.hex()}, this one is {self._head.hex()}",
                hint="the run was restarted with other settings: join it again",
            )
        head = chain_digest(record.parent, record.encode())
        self._step(record, record.digest)
        self._head = head

    def prepare(
        self,
        index: int,
        round_: int,
        learning_rate: float,
        segments: tuple[tuple[int, int], ...],
        coefficients: NDArray[np.float32],
        ages: tuple[int, ...] = (),
    ) -> UpdateRecord:
        """The server's side of :meth:`apply`: make the next record and apply it.

        Args:
            index: Must be :attr:`index`.
            round_: Round whose directions were probed.
            learning_rate: A float32 value.
            segments: ``(first position, count)`` runs, as :class:`~..wire.messages.UpdateRecord` has them.
            coefficients: ``float32[sum of counts]`` from :func:`~..perturbation.directions.round_coefficients`.
            ages: Of the segments; empty if all are of this round.

        Returns:
            The record, with parent and digest filled in.

        Raises:
            ProtocolError: The index is wrong, the record is malformed, a coefficient has more than 13 significant
                bits, or weights or moments would no longer be finite. Nothing has changed then.
        """
        self._check_index(index)
        if not np.array_equal(round_coefficients(coefficients.astype(np.float64)), coefficients):
            raise ProtocolError(
                "a coefficient has more than 13 significant bits", hint="pass them to round_coefficients"
            )
        with np.errstate(over="ignore"):  # a rate beyond float32 is refused, not warned about
            blank = bytes(DIGEST_BYTES)
            draft = UpdateRecord(index, round_, learning_rate, segments, coefficients, self._head, blank, ages)
        self._step(draft, None)
        record = dataclasses.replace(draft, digest=self._digest)
        self._head = chain_digest(record.parent, record.encode())
        return record

    def _check_index(self, index: int) -> None:
        if index != self.index:
            raise ProtocolError(
                f"update {index} was given, update {self.index} is next",
                hint="ask for the missing records" if index > self.index else "drop it: it was applied before",
            )

    def _step(self, record: UpdateRecord, expected: bytes | None) -> None:
        """One optimiser step, undone when the weights are not finite or do not have the expected digest."""
        weights, state = self._weights.copy(), tuple(part.copy() for part in self._optimiser.state)
        with np.errstate(over="ignore", invalid="ignore"):
            gradient = self.gradient(record)
            self._optimiser.step(self._weights, gradient, np.float32(record.learning_rate))
        digest = weights_digest(self._weights)
        # A moment that overflows would freeze its weight for good, so it counts as well.
        finite = all(np.isfinite(part).all() for part in (self._weights, *self._optimiser.state))
        if finite and expected in (None, digest):
            self._digest = digest
            if self._average is not None:
                self._average.add(self._weights)
            self._remember(record)
            return
        np.copyto(self._weights, weights)
        self._optimiser.restore(record.index, state)
        if not finite:
            raise ProtocolError(
                f"update {record.index} makes weights or moments that are not finite", hint="lower the learning rate"
            )
        raise ProtocolError(
            f"after update {record.index} the weights have the digest {digest.hex()}, the server's have "
            f"{record.digest.hex()}",
            hint="run the self-test (fedzo-device doctor), then fetch a snapshot",
        )

    def _remember(self, record: UpdateRecord) -> None:
        """What later updates need to know of this one; late scalars tell the rankings nothing."""
        if self._past.limit:
            chosen = (ranking.chosen(k) for ranking, k in zip(self._rankings, self._sketched, strict=True))
            self._past.note(PastRound(record.round, tuple(chosen)))
        for basis, pieces in zip(self._directions, _pieces(self.blocks, record), strict=True):
            if isinstance(basis, CoordinateRanking):
                start, stop = pieces.get(0, (0, 0))
                basis.advance(record.coefficients[start:stop])

    @property
    def snapshot_bytes(self) -> int:
        """Length of :meth:`snapshot`."""
        return self.snapshot_bytes_at(self.index)

    def snapshot_bytes_at(self, index: int) -> int:
        """Length of a snapshot after that many records."""
        return self._snapshot_ends()[-1] + self._past.state_bytes(index)

    def _snapshot_ends(self) -> list[int]:
        """Where its arrays end, then each ranking."""
        n_arrays = 1 + len(self._optimiser.state) + len(self._average_sums())
        return list(
            accumulate([_SNAPSHOT.size + 4 * n_arrays * self._weights.size, *(r.state_bytes for r in self._rankings)])
        )

    def snapshot(self) -> bytes:
        """Everything that :meth:`restore` needs, about ``4 * n_survivors`` bytes per array, little-endian."""
        arrays = (self._weights, *self._optimiser.state, *self._average_sums())
        header = _SNAPSHOT.pack(_SNAPSHOT_MAGIC, self._weights.size, self.index, self._start, self._head, self._digest)
        rankings = b"".join(ranking.state() for ranking in self._rankings)
        values = b"".join(array.astype("<f4", copy=False).tobytes() for array in arrays)
        return header + values + rankings + self._past.state()

    def _average_sums(self) -> tuple[NDArray[np.float32], ...]:
        return () if self._average is None else (self._average.sums,)

    def restore(self, snapshot: bytes) -> None:
        """Go to the state of a :meth:`snapshot` of the same run, whether behind or ahead.

        Raises:
            ProtocolError: The bytes are no snapshot of a run with these settings. Nothing has changed then.
        """
        moments = len(self._optimiser.state)
        arrays = 1 + moments + len(self._average_sums())
        size = self._weights.size
        ends = self._snapshot_ends()
        wrong = f"a snapshot of {len(snapshot)} bytes does not hold {arrays} arrays of {size} entries"
        if len(snapshot) < ends[-1]:
            raise ProtocolError(wrong)
        magic, found, index, start, head, digest = _SNAPSHOT.unpack_from(snapshot)
        if len(snapshot) != self.snapshot_bytes_at(index):
            raise ProtocolError(wrong)
        if magic != _SNAPSHOT_MAGIC or found != size or start != self._start:
            raise ProtocolError("the snapshot belongs to a run with other settings")
        values = np.frombuffer(snapshot, "<f4", arrays * size, _SNAPSHOT.size).reshape(arrays, size)
        if weights_digest(values[0]) != digest or not np.isfinite(values).all():
            raise ProtocolError("the snapshot's arrays are damaged")
        for ranking, (first, end) in zip(self._rankings, pairwise(ends), strict=True):
            ranking.check(snapshot[first:end])
        past = self._past.read(snapshot[ends[-1] :], [ranking.size for ranking in self._rankings])
        np.copyto(self._weights, values[0])
        self._optimiser.restore(index, tuple(values[1 : 1 + moments]))
        self._past.restore(past)
        if self._average is not None:
            self._average.restore(index, values[-1])
        for ranking, (first, end) in zip(self._rankings, pairwise(ends), strict=True):
            ranking.restore(index, snapshot[first:end])
        self._digest, self._head = digest, head
