"""How far a run has come: mask, weights and evaluations, and what the reports of a round make of them.

Everything here follows from the journal alone: what is decided is recorded, and :meth:`RunProgress.adopt_mask`,
:meth:`RunProgress.adopt_update` and :meth:`RunProgress.adopt_evaluation` read it back after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact.manifest import Manifest
from ..device_side.parts import start_replica
from ..errors import ConfigError, FedzoError, ProtocolError
from ..perturbation.blocks import Deal
from ..perturbation.dealing import deals_of
from ..pruning.layer_densities import read_mask
from ..pruning.mask import Mask
from ..pruning.mask_choice import check_pruning, federated_mask, mask_from_seed
from ..wire.documents import Announcement, Phase, RunDocument
from ..wire.messages import Report, UpdateRecord
from ..wire.participants import pack_participants
from .adaptation import Adaptation
from .aggregation import MAX_PARTICIPANTS, combine_scores, evaluate_reports
from .coordinator_events import ServerEvaluated
from .pace import paced_levels, pack_levels
from .rate_finder import RangeTest
from .roster import Member
from .selection import select
from .staleness import Group, combine_groups

__all__ = ["EvaluationRecord", "RunProgress"]

EvaluationRecord = dict[str, float | int | str | None]


class RunProgress:
    """The state of one run.

    Args:
        run: Run id, artifact and settings.
        manifest: The artifact.

    Raises:
        ConfigError: The artifact cannot be pruned like this, or no update has room for the quorum.

    Attributes:
        mask: The survivors.
        mask_sha256: Hex hash of the encoded mask; empty for the dense mask.
        replica: The weights.
        evaluations: What evaluation rounds found, oldest first.
        range_test: What a range test has found so far; None if this is none.
        unscored: Weights of layers that the last scores said nothing about; empty after a restart.
    """

    def __init__(self, run: RunDocument, manifest: Manifest) -> None:
        self._run = run
        self._manifest = manifest
        self._scored = 0
        self._evaluated_at = -1
        self._evaluated = (b"", b"")
        self.evaluations: list[EvaluationRecord] = []
        self.unscored: tuple[str, ...] = ()
        self.range_test = RangeTest() if run.training.schedule == "range" else None
        check_pruning(manifest, run.settings)
        self._set_mask(Mask.dense(manifest.layout), b"")
        self._check_room()

    def _set_mask(self, mask: Mask, encoded: bytes) -> None:
        self.mask, self._mask_size = mask, len(encoded)
        self.mask_sha256 = hashlib.sha256(encoded).hexdigest() if encoded else ""
        self.replica = start_replica(self._run, self._manifest, mask)
        self._adaptation = Adaptation(self._run.training, is_robust=not self._run.settings.aggregation.is_plain)

    @property
    def room(self) -> int:
        """How many devices a round of training may ask: the scalars and segments of all must fit one update."""
        return MAX_PARTICIPANTS // (len(self.replica.blocks) * (1 + self._run.settings.staleness))

    def _check_room(self) -> None:
        settings, room, n_blocks = self._run.settings, self.room, len(self.replica.blocks)
        for name, value in (("quorum", settings.quorum), ("close at", settings.close_at)):
            if value > room:
                raise ConfigError(
                    f"{name} is {value}, but a round of training may ask {room} devices: {MAX_PARTICIPANTS} over "
                    f"{n_blocks} blocks of weights and {1 + settings.staleness} rounds that may count in an update",
                    hint=f"--{name.replace(' ', '-')} {max(room, 1)} or less, fewer sections, or a smaller --staleness",
                )

    @property
    def awaits_mask(self) -> bool:
        """Whether the next step is a mask that the server's engine has to make."""
        return self.next_phase() == "saliency" and self._run.saliency.method == "synflow"

    def next_phase(self) -> Phase:
        """What the next round is for."""
        settings, length = self._run.settings, self.replica.index
        n_masks = settings.saliency.n_steps if settings.saliency.is_federated else 1
        if settings.sparsity > 0 and self._scored < n_masks:
            return "saliency"
        if self.range_test is not None:
            return "done" if self.range_test.is_over or length == settings.training.rounds else "train"
        every = settings.evaluate_every
        due = length == settings.training.rounds or (every > 0 and length > 0 and length % every == 0)
        if due and self._evaluated_at != length:
            return "evaluate"
        return "train" if length < settings.training.rounds else "done"

    def announce(self, phase: Phase, round_: int, ready: Sequence[Member]) -> Announcement:
        """The announcement of the next round.

        Args:
            phase: What it is for.
            round_: Its number.
            ready: Devices that it can count on, in the order of ordinals; :func:`~.selection.select` draws from them.
                The more blocks there are, the fewer devices one update has room for (:attr:`room`).
        """
        settings = self._run.settings
        most = self.room if phase == "train" else MAX_PARTICIPANTS
        wanted = settings.participants if phase != "done" else 0
        members = select(settings.seed, round_, ready, wanted=wanted, most=most)
        has_log, training, k = phase != "saliency", self._run.training, self._adaptation.k or self._run.training.k
        levels = paced_levels(members, k, training.k_min) if phase == "train" else []
        return Announcement(
            run=self._run.run,
            round=round_,
            phase=phase,
            participants=pack_participants(np.array([member.ordinal for member in members], dtype=np.int64)),
            mask_sha256=self.mask_sha256,
            mask_size=self._mask_size,
            log_length=self.replica.index,
            log_head=self.replica.head.hex() if has_log else "",
            weights_digest=self.replica.digest.hex() if has_log else "",
            k=self._adaptation.k,
            sigma=self._adaptation.sigma,
            pace=pack_levels(levels),
        )

    def deals(self, head: Announcement) -> tuple[Deal, ...]:
        """The positions that an announced round hands out; none unless weights are trained."""
        return deals_of(self._run.settings, self.replica.blocks, head)

    def digest_for(self, phase: Phase) -> bytes:
        """Digest of the weights that a round of this phase is measured with, 16 bytes."""
        if phase != "evaluate":
            return self.replica.digest
        if self._evaluated[0] != self.replica.head:  # Every report asks, and an average has to be hashed.
            self._evaluated = self.replica.head, self.replica.evaluated()[1]
        return self._evaluated[1]

    # --- decisions ------------------------------------------------------------------------------------------------

    def choose_mask(self, reports: Sequence[Report]) -> bytes:
        """The encoded mask of the next sparsity step; still to be adopted."""
        blocks = [block.astype(np.float32) for block in combine_scores(reports, self._run.settings.aggregation)]
        chosen = federated_mask(
            self._manifest, self._run.settings, self.mask, self.replica.weights, blocks, self._scored + 1
        )
        self.unscored = chosen.unscored
        return chosen.encoded

    def own_mask(self) -> bytes | None:
        """The encoded mask, if the next step is one that needs neither devices nor forward passes; to be adopted."""
        if self.next_phase() != "saliency" or self._run.saliency.method not in ("magnitude", "erk", "random"):
            return None
        return mask_from_seed(self._manifest, self._run.settings)

    def make_update(
        self, head: Announcement, reports: Sequence[tuple[int, Report]], late: Sequence[Group] = ()
    ) -> UpdateRecord:
        """The next update, applied.

        Args:
            head: The round's announcement.
            reports: ``(rank, report)`` of every usable report.
            late: Those of earlier rounds.

        Raises:
            FedzoError: The update cannot be made; nothing has changed.
        """
        settings, training, index = self._run.settings, self._run.training, self.replica.index
        groups = [*late, Group(0, self.deals(head), tuple(reports))] if reports else list(late)
        try:
            segments, coefficients, ages = combine_groups(groups, settings.aggregation, settings.staleness_power)
            record = self.replica.prepare(index, head.round, training.rate(index), segments, coefficients, ages)
        except ProtocolError as error:
            raise FedzoError(f"training diverged: {error.message}", hint="lower --learning-rate") from None
        self._learn(head, reports, record)
        return record

    def _learn(self, head: Announcement, reports: Sequence[tuple[int, Report]], record: UpdateRecord) -> None:
        """What a round with an update says about the next ones."""
        self._adaptation.learn(head, self.deals(head), reports, record, self.replica)
        if self.range_test is not None:
            # The median: a device may report any loss.
            self.range_test.add(record.learning_rate, float(np.median([report.mean_loss for _, report in reports])))

    def count(self, reports: Sequence[Report], server: ServerEvaluated | None) -> EvaluationRecord:
        """The result of an evaluation round; still to be adopted."""
        devices = evaluate_reports(reports)
        return {
            "log_length": self.replica.index,
            "weights_digest": self.replica.digest.hex(),
            "weights": "average" if self._run.training.optimiser.ema else "last",
            "devices": len(reports),
            "loss": devices.mean_loss if devices else None,
            "accuracy": devices.accuracy if devices else None,
            "samples": devices.samples if devices else 0,
            "server_loss": server.mean_loss if server else None,
            "server_accuracy": server.accuracy if server else None,
            "server_samples": server.samples if server else 0,
        }

    # --- snapshots ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a snapshot says of it beside the weights, as JSON types."""
        test = self.range_test
        return {
            "scored": self._scored,
            "evaluated_at": self._evaluated_at,
            "adaptation": self._adaptation.state(),
            "range_test": test.state() if test is not None else None,
        }

    def state_arrays(self) -> bytes:
        """And what is no JSON."""
        return self._adaptation.state_arrays()

    def restore(self, state: Mapping[str, Any], arrays: bytes, replica: bytes) -> None:
        """Go to the state of a snapshot of this run; mask and evaluations were adopted.

        Raises:
            ProtocolError: The weights belong to another run or mask.
            KeyError, TypeError, ValueError: The state is nothing of the kind.
        """
        self.replica.restore(replica)
        self._scored, self._evaluated_at = int(state["scored"]), int(state["evaluated_at"])
        self._adaptation.restore(state["adaptation"], arrays)
        if self.range_test is not None:
            self.range_test.restore(state["range_test"])

    # --- the journal ----------------------------------------------------------------------------------------------

    def adopt_mask(self, encoded: bytes) -> None:
        """Go on with a recorded mask.

        Raises:
            ProtocolError: It is no mask of this artifact.
        """
        self._set_mask(read_mask(encoded, self._manifest.layout, self._run.settings.fill), encoded)
        self._scored += 1

    def adopt_update(self, record: UpdateRecord, head: Announcement, reports: Sequence[tuple[int, Report]]) -> None:
        """Replay a recorded update.

        Args:
            record: The update.
            head: Announcement of its round.
            reports: What :meth:`make_update` got for it.

        Raises:
            ProtocolError: It gives other weights.
        """
        self.replica.apply(record)
        self._learn(head, reports, record)

    def adopt_evaluation(self, result: EvaluationRecord) -> None:
        """Note a recorded evaluation."""
        self.evaluations.append(result)
        self._evaluated_at = self.replica.index
