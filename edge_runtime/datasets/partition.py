"""Splits of one labelled data set over simulated devices: IID, by shards and by a Dirichlet law, from a seed.

The random bits come from the protocol's Philox streams. The Dirichlet split also uses ``log`` and ``exp``, which may
differ in the last bit between machines; a split is made once, on one machine, so that only moves a sample at a border.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError
from ...protocol.perturbation.streams import Purpose, permutation, uint64s

__all__ = ["partition_dirichlet", "partition_iid", "partition_shards"]

_MAX_TRIES = 1000


def partition_iid(n_samples: int, n_devices: int, seed: int) -> list[NDArray[np.int64]]:
    """Shuffle and deal evenly; sizes differ by at most one.

    Returns:
        One ascending ``int64[n]`` of sample indices a device, disjoint, together all samples.

    Raises:
        ConfigError: There are fewer samples than devices.
    """
    _check(n_samples, n_devices)
    order = permutation(seed, Purpose.SAMPLING, 0, 0, n_samples)
    return [np.sort(part) for part in np.array_split(order, n_devices)]


def partition_shards(
    labels: NDArray[np.int64], n_devices: int, seed: int, *, shards_per_device: int = 2
) -> list[NDArray[np.int64]]:
    """Sort by label, cut into equal shards and deal them: most devices see few classes.

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017.

    Returns:
        One ascending ``int64[n]`` of sample indices a device, disjoint, together all samples.

    Raises:
        ConfigError: There are fewer samples than shards.
    """
    n_shards = n_devices * shards_per_device
    _check(len(labels), max(n_shards, n_devices))
    # Shuffled first, so that the samples of a label are not in file order.
    order = permutation(seed, Purpose.SAMPLING, 1, 0, len(labels))
    shards = np.array_split(order[np.argsort(labels[order], kind="stable")], n_shards)
    dealt = permutation(seed, Purpose.SAMPLING, 1, 1, n_shards)
    hands = dealt.reshape(n_devices, shards_per_device)
    return [np.sort(np.concatenate([shards[k] for k in hand.tolist()])) for hand in hands]


def partition_dirichlet(
    labels: NDArray[np.int64], n_devices: int, alpha: float, seed: int, *, smallest: int = 1
) -> list[NDArray[np.int64]]:
    """Deal each class by proportions drawn from a symmetric Dirichlet law; drawn again until every device has
    ``smallest`` samples.

    Source: Hsu et al., "Measuring the effects of non-identical data distribution for federated visual
    classification", arXiv 1909.06335.

    Args:
        labels: ``int64[n]``.
        n_devices: Number of parts.
        alpha: Concentration; 0.1 is strongly skewed, 100 is nearly IID.
        seed: Of the split.
        smallest: Least samples a device; 0 allows empty parts.

    Returns:
        One ascending ``int64[n]`` of sample indices a device, disjoint, together all samples.

    Raises:
        ConfigError: ``alpha`` is not positive, or no draw gives every device ``smallest`` samples.
    """
    _check(len(labels), n_devices * max(1, smallest))
    if not (math.isfinite(alpha) and 0 < alpha <= 1e6):
        raise ConfigError(f"alpha is {alpha}, it must be above 0 and at most 1e6")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for attempt in range(_MAX_TRIES):
        uniforms = _uniforms(seed, attempt)
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(n_devices)]
        for number, samples in enumerate(members):
            shuffled = samples[permutation(seed, Purpose.SAMPLING, 2 + attempt, 1 + number, len(samples))]
            weights = _dirichlet(uniforms, alpha, n_devices)
            cuts = np.rint(np.cumsum(weights)[:-1] * len(samples)).astype(np.int64)
            for part, piece in zip(parts, np.split(shuffled, cuts), strict=True):
                part.append(piece)
        whole = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, whole)) >= smallest:
            return whole
    raise ConfigError(
        f"no Dirichlet split of {len(labels)} samples with alpha {alpha} gave each of {n_devices} devices"
        f" {smallest} samples in {_MAX_TRIES} tries",
        hint="use a larger alpha, fewer devices or a smaller minimum",
    )


def _check(n_samples: int, wanted: int) -> None:
    if wanted < 1 or n_samples < wanted:
        raise ConfigError(f"{n_samples} samples cannot be split into {wanted} parts", hint="use fewer devices")


def _uniforms(seed: int, attempt: int) -> Iterator[float]:
    """Endless floats in (0, 1) from 53 bits each."""
    block = 0
    while True:
        words = uint64s(seed, Purpose.SAMPLING, 2 + attempt, (1 << 32) + block, 512)
        yield from ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54).tolist()
        block += 1


def _dirichlet(uniforms: Iterator[float], alpha: float, n: int) -> NDArray[np.float64]:
    logs = np.array([_log_gamma_variate(uniforms, alpha) for _ in range(n)])
    # Normalised in logarithms: with a small alpha every variate may underflow.
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def _log_gamma_variate(uniforms: Iterator[float], shape: float) -> float:
    """Logarithm of a Gamma(shape, 1) variate: Marsaglia and Tsang, ACM TOMS 26 (2000), boosted below 1."""
    boost = 0.0
    if shape < 1.0:
        boost = math.log(next(uniforms)) / shape
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        radius = math.sqrt(-2.0 * math.log(next(uniforms)))
        x = radius * math.cos(2.0 * math.pi * next(uniforms))
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(next(uniforms)) < 0.5 * x * x + d - d * v + d * math.log(v):
            return math.log(d * v) + boost
