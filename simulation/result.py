"""What a simulation came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..protocol.pruning.mask import Mask

__all__ = ["CurveRow", "Progress", "RoundRow", "SimulationResult"]


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round of training.

    Attributes:
        round: Updates made, this one included.
        participants: Devices that it asked.
        reports: Devices whose scalars count in it.
        mean_loss: Mean over these of the loss of their batches before the update.
        sample_forwards: Samples sent through the network in training so far; a part of it counts by its
            multiplications, and work that came too late counts too.
        virtual_s: Virtual time of its update.
    """

    round: int
    participants: int
    reports: int
    mean_loss: float
    sample_forwards: float
    virtual_s: float


@dataclass(frozen=True, slots=True)
class CurveRow:
    """One evaluation.

    Attributes:
        round: Updates before it.
        sample_forwards: See :class:`RoundRow`.
        mean_loss: Of the latest round of training; None before the first.
        test_accuracy: On the server's test set; None without one.
        test_loss: Likewise.
        device_accuracy: On what the devices hold out; None if nothing.
        virtual_s: When.
    """

    round: int
    sample_forwards: float
    mean_loss: float | None
    test_accuracy: float | None
    test_loss: float | None
    device_accuracy: float | None
    virtual_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a simulation stands, for whoever watches.

    Attributes:
        phase: Of the open round.
        round: Updates made.
        rounds: Updates to make.
        ready: Devices that a round can count on.
        sample_forwards: See :class:`RoundRow`.
        mean_loss: Of the latest round of training.
        accuracy: The latest, on the server's test set or else the devices' samples.
        virtual_s: Virtual time.
        curve: The evaluations so far; the list grows as the simulation goes on.
        training: The rounds of training so far; likewise.
    """

    phase: str
    round: int
    rounds: int
    ready: int
    sample_forwards: float
    mean_loss: float | None
    accuracy: float | None
    virtual_s: float
    curve: Sequence[CurveRow]
    training: Sequence[RoundRow]


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """Everything that a simulation found. Numbers of a device and round are means over rounds of training.

    Attributes:
        curve: The evaluations.
        rounds: The rounds of training.
        weights: ``float32[n_survivors]``.
        mask: The survivors.
        digest: Of the weights, 32 hex digits.
        learning_rate: Peak rate; the one that was found after a range test.
        devices: Virtual devices.
        devices_agree: Every device that ended with the run holds these weights.
        devices_done: How many that are.
        sample_forwards: See :class:`RoundRow`.
        scoring_sample_forwards: Those of the devices' scoring.
        tuning_sample_forwards: All passes of the range test that came before the run; 0 without one.
        scalars_per_device_round: Scalars of a report that counts.
        queries_per_device_round: Passes through the network or a part of it, for such a report.
        bytes_up_per_device_round: Bytes of PUBLISH packets that devices sent during training, a participant and round.
        bytes_down_per_device_round: Bytes of those that a device got, any device and round, while it was connected.
        bytes_up: All bytes of all devices, from joining to the end.
        bytes_down: Likewise. Graphs are taken to be on the boards already; masks and missed updates are counted.
        late_reports: Reports that came after their round.
        dropouts: Times that a device was lost.
        declined: Reports without scalars.
        decline_detail: Why the first of them had none, in one line.
        wall_s: Wall time, without loading data and starting processes.
        training_wall_s: Wall time from the first training announcement to the last update.
        start_wall_s: Wall time of loading, starting processes and of the devices' joining.
        engine_s: Wall time inside engines, summed over processes: putting weights in place, and forward passes.
        engine_cpu_s: Processor time inside engines, likewise.
        engine_share: ``engine_s`` over ``processes * training_wall_s``, both of training alone.
        engine_cpu_share: The part of ``training_cpu_s`` inside engines.
        forward_cpu_share: The part of it inside ONNX Runtime.
        work_cpu_share: The part of it inside tasks, that is what boards would do too: the rest is the simulation's.
        training_cpu_s: Processor time of all processes from the first training announcement to the last update.
        processes: Processes that computed.
        virtual_s: Virtual time of the run.
        virtual_s_per_round: Virtual time between updates, on average; 0 without boards and bandwidth.
        peak_rss_mib: Of this process and the pool's; what they share is counted in each.
        boards: Devices by profile.
    """

    curve: list[CurveRow]
    rounds: list[RoundRow]
    weights: NDArray[np.float32] = field(repr=False)
    mask: Mask = field(repr=False)
    digest: str
    learning_rate: float
    devices: int
    devices_agree: bool
    devices_done: int
    sample_forwards: float
    scoring_sample_forwards: float
    tuning_sample_forwards: float
    scalars_per_device_round: float
    queries_per_device_round: float
    bytes_up_per_device_round: float
    bytes_down_per_device_round: float
    bytes_up: int
    bytes_down: int
    late_reports: int
    dropouts: int
    declined: int
    decline_detail: str
    wall_s: float
    training_wall_s: float
    start_wall_s: float
    engine_s: float
    engine_cpu_s: float
    engine_share: float
    engine_cpu_share: float
    forward_cpu_share: float
    work_cpu_share: float
    training_cpu_s: float
    processes: int
    virtual_s: float
    virtual_s_per_round: float
    peak_rss_mib: float
    boards: dict[str, int]

    @property
    def accuracy(self) -> float | None:
        """The last one on the server's test set, or else on the devices' samples."""
        if not self.curve:
            return None
        last = self.curve[-1]
        return last.device_accuracy if last.test_accuracy is None else last.test_accuracy
