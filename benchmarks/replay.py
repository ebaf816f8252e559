"""What replaying updates costs: regenerating Gaussian directions against one fast Walsh-Hadamard transform.

``python -m benchmarks.replay [--json] [--survivors 54000] [--directions 5000]``

The time of a family is that of :meth:`Directions.combine`, as every device runs it for every update. The hadamard
side includes the row lookup and the signs of a new round; the permutation of the rows is made once a run and has its
own row. Each hadamard time is a median over rounds; the other families run once, as one run takes seconds.
"""

from __future__ import annotations

import argparse

import numpy as np

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.perturbation.blocks import whole_block
from fedzo.protocol.perturbation.directions import FAMILIES, Directions, round_coefficients
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, uint16s
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.replay.update import Replica

from .report import Report, median_s

SEED = 7


def _coefficients(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    bits = uint16s(SEED, Purpose.SAMPLING, 0, 0, count)
    return round_coefficients(np.take(gaussian_table(), bits, mode="clip").astype(np.float64))


def measure(survivors: int, count: int) -> Report:
    """Time every family at ``survivors`` weights and ``count`` directions an update."""
    positions, coefficients = np.arange(count, dtype=np.int64), _coefficients(count)
    buffer = np.empty(survivors, dtype=np.float32)
    rows, combine_s = [], {}
    for family in FAMILIES:
        directions = Directions(family, SEED, survivors)
        first_s = median_s(lambda k, d=directions: d.direction(0, k, buffer), 1)  # type: ignore[misc]
        one_s = median_s(lambda k, d=directions: d.direction(0, k, buffer), 9, number=50)  # type: ignore[misc]
        repeats = 25 if family == "hadamard" else 1
        combine_s[family] = median_s(
            lambda k, d=directions: d.combine(1 + k, positions, coefficients),  # type: ignore[misc]
            repeats,
        )
        rows.append(
            {
                "family": family,
                "first_direction_ms": 1e3 * first_s,
                "direction_us": 1e6 * one_s,
                "combine_ms": 1e3 * combine_s[family],
                "combine_repeats": repeats,
            }
        )
    replica = _replica(survivors)
    update_s = median_s(
        lambda k: replica.prepare(k, k, 2.0**-10, ((0, count),), coefficients),
        25,
    )
    name = f"{survivors}x{count}"
    figures = {
        f"gaussian_over_hadamard_{name}": combine_s["gaussian"] / combine_s["hadamard"],
        f"rademacher_over_hadamard_{name}": combine_s["rademacher"] / combine_s["hadamard"],
        f"gaussian_combine_s_{name}": combine_s["gaussian"],
        f"hadamard_combine_ms_{name}": 1e3 * combine_s["hadamard"],
        f"hadamard_adam_update_ms_{name}": 1e3 * update_s,
    }
    return Report({"survivors": survivors, "directions": count, "seed": SEED}, rows, figures)


def _replica(survivors: int) -> Replica:
    layout = Layout((Parameter("w", (survivors,), True, Initialiser("normal", 0.125)),))
    return Replica(layout, Mask.dense(layout), SEED, SEED, whole_block("hadamard", survivors), OptimiserConfig("adam"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--survivors", type=int, default=54_000, help="surviving weights (default %(default)s)")
    parser.add_argument("--directions", type=int, default=5_000, help="directions an update (default %(default)s)")
    arguments = parser.parse_args()
    measure(arguments.survivors, arguments.directions).write(as_json=arguments.json)


if __name__ == "__main__":
    main()
