"""What a simulation adds to the settings of a run: the devices, their data, their boards and their misfortunes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..protocol.device_side.device import RETRY_S
from ..protocol.errors import ConfigError

__all__ = ["SimulationSettings", "parse_boards", "parse_split"]

MAX_DEVICES = 100_000


_FIELDS = {"the number of virtual devices": "devices", "the simulation's seed": "seed"}


def _check(ok: bool, name: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}, it must be {want}", setting=_FIELDS.get(name, name))


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """The world around a run.

    Attributes:
        devices: Virtual devices; 0 for as many as the run waits for. Of ``natural`` data the first clients are taken.
        split: Who holds which samples: ``iid``, ``shards``, ``shards:N`` (N shards a device), ``dirichlet:ALPHA`` or
            ``natural`` (the data say who).
        clients: For ``natural``: a ``.npy`` file with one client number a sample; else the array ``client`` of the
            ``.npz`` file.
        holdout: Fraction of its samples that every device keeps for evaluation.
        seed: Of split, boards, joining and dropouts.
        dropout: Probability that a device is lost during a round that asks it.
        join_spread_s: Devices join at times spread over so many virtual seconds, drawn from the seed.
        boards: Hardware profiles with their shares, ``rpi-4b-4gb:0.5,rpi-zero-2w:0.5``; empty for devices that compute
            in no time.
        bandwidth_kbit_s: Of every device's link, in each direction; 0 for links that take no time.
        latency_s: Time of a message on its way, besides that.
        micro_batch: Samples of one run of a graph; 0 for what the boards' plans say.
        many_queries: Evaluate several sets of weights in one run where the artifact has a graph for it.
        retry_s: Virtual time after which a device repeats an unanswered request.
        mean: Subtracted from inputs, see :func:`~fedzo.edge_runtime.datasets.data.load_dataset`.
        std: Inputs are divided by it.
        pad: Center smaller images in zeros.
    """

    devices: int = 0
    split: str = "iid"
    clients: str = ""
    holdout: float = 0.0
    seed: int = 1
    dropout: float = 0.0
    join_spread_s: float = 0.0
    boards: str = ""
    bandwidth_kbit_s: float = 0.0
    latency_s: float = 0.0
    micro_batch: int = 0
    many_queries: bool = True
    retry_s: float = RETRY_S
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pad: bool = False

    def __post_init__(self) -> None:
        _check(0 <= self.devices <= MAX_DEVICES, "the number of virtual devices", self.devices, f"0 to {MAX_DEVICES}")
        kind, _ = parse_split(self.split)
        if self.clients and kind != "natural":
            raise ConfigError(
                f"the split {self.split} does not look at the clients of {self.clients}",
                hint="--split natural, or leave --clients away",
            )
        parse_boards(self.boards)
        _check(0.0 <= self.holdout < 1.0, "holdout", self.holdout, "at least 0 and below 1")
        _check(0 <= self.seed < 1 << 64, "the simulation's seed", self.seed, "an unsigned 64-bit number")
        _check(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "at least 0 and below 1")
        for name in ("join_spread_s", "bandwidth_kbit_s", "latency_s"):
            value = getattr(self, name)
            _check(math.isfinite(value) and 0.0 <= value <= 1e9, name, value, "0 or more")
        _check(0 <= self.micro_batch <= 1 << 16, "micro_batch", self.micro_batch, "0 to 65536")
        _check(0.01 <= self.retry_s <= 1e7, "retry_s", self.retry_s, "0.01 s or more")


def parse_split(text: str) -> tuple[str, float]:
    """Kind and number of a split; the number is 0 where there is none.

    Raises:
        ConfigError: It is no split.
    """
    kind, colon, number = text.partition(":")
    try:
        value = float(number) if colon else {"shards": 2.0}.get(kind, 0.0)
    except ValueError:
        value = math.nan
    fits = {
        "iid": not colon,
        "natural": not colon,
        "shards": value.is_integer() and 1 <= value <= 1000,
        "dirichlet": bool(colon) and 0 < value <= 1e6,
    }
    if not fits.get(kind, False):
        raise ConfigError(
            f"the split is {text!r}", hint="use iid, shards, shards:2, dirichlet:0.1 (any number above 0) or natural"
        )
    return kind, value


def parse_boards(text: str) -> tuple[tuple[str, float], ...]:
    """Profiles and shares, which are made to add up to 1.

    Raises:
        ConfigError: It is no list of profiles with shares.
    """
    if not text:
        return ()
    found = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        try:
            share = float(number) if colon else 1.0
        except ValueError:
            share = math.nan
        if not name or not (math.isfinite(share) and share > 0):
            raise ConfigError(f"the boards are {text!r}", hint="use NAME:SHARE,NAME:SHARE with shares above 0")
        found.append((name, share))
    total = sum(share for _, share in found)
    return tuple((name, share / total) for name, share in found)
