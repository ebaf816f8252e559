"""What the phases of a run really use on this machine: ``python -m fedzo.edge_runtime.planning.measure ARTIFACT ...``.

A process of its own that does what a device does, without a connection: it loads what a device loads, the plan is made
under the budget and its limit of the arena is enforced; then it scores a few units, probes, updates and evaluates. The
peak (``VmHWM``) is reset between the phases. Prints one JSON object.

Tensor bytes are the smallest limit of the arena under which a phase still runs, found by bisection.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..connection.light_imports import hashlib_without_openssl
from .peaks import Watch
from .resident import keep_small

__all__ = ["main"]


def main() -> int:
    """Print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("artifact", type=Path)
    add("--budget-mib", type=float, required=True)
    add("--threads", type=int, default=1)
    add("--batch", type=int, help="[default: that of fedzo serve]")
    add("--samples", type=int, help="[default: those of fedzo serve]")
    add("--sparsity", type=float)
    add("--micro-batch", type=int)
    add("--fill", choices=("zero", "init"), help="[default: that of fedzo serve]")
    add("--pruning", help="[default: that of fedzo serve]")
    add("--estimator", help="[default: that of fedzo serve, local for an artifact with local heads]")
    add("--variant", action="store_true", help="plan and run the graphs for this machine where they fit")
    add("--tensors", action="store_true", help="look for the tensor bytes as well")
    options = parser.parse_args()
    keep_small()
    hashlib_without_openssl()
    with Watch() as watch:
        answer, code = _answer(options, watch)
    sys.stdout.write(json.dumps(answer) + "\n")
    return code


def _answer(options: argparse.Namespace, watch: Watch) -> tuple[dict[str, object], int]:
    from ...protocol.errors import ConfigError, FedzoError, MemoryBudgetError
    from ..inference.variants import wanted_variants
    from ..storage.artifact import load_artifact
    from .board_plan import RunSizes
    from .phases import measure

    try:
        artifact, usual = load_artifact(options.artifact), RunSizes()
        sizes = RunSizes(
            options.batch or usual.batch,
            options.samples or usual.samples,
            options.sparsity,
            options.threads,
            options.micro_batch,
            variants=wanted_variants(artifact.manifest, portable=not options.variant),
            fill=options.fill or usual.fill,
            pruning=options.pruning or usual.pruning,
            estimator=options.estimator or ("local" if artifact.manifest.learns_locally else usual.estimator),
        )
        return measure(artifact, options.budget_mib, sizes, watch, tensors=options.tensors), 0
    except (FedzoError, MemoryError, OSError) as error:
        if isinstance(error, FedzoError):
            failure = error
        elif isinstance(error, MemoryError):
            failure = MemoryBudgetError(f"no memory left: {error}")
        else:
            failure = ConfigError(f"nothing can be measured here: {error}", hint="measure on a Linux with /proc")
        told = {"message": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
        return {"error": told}, failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
