"""`fedzo deploy`: from a run to a plain inference model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .output import Output

__all__ = ["register"]


class ModelOutput(str, Enum):
    """What the model yields."""

    logits = "logits"
    softmax = "softmax"


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def deploy(
        output: Output,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
        out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="ONNX file to write.")] = Path(
            "model.onnx"
        ),
        kind: Annotated[ModelOutput, typer.Option("--kind", help="What the model yields.")] = ModelOutput.logits,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    ) -> None:
        """Write a plain ONNX model with the trained weights, and check it against the run.

        The weights are rebuilt from the journal: mask, newest snapshot, and every update after it (fedzo replay starts
        from the seed). A run with an average of its weights (--ema) is deployed with the average.

        Example:
            $ fedzo deploy runs/lenet5-20260101-120000-1 -o model.onnx
            $ fedzo deploy runs/lenet5-20260101-120000-1 --kind softmax -o model.onnx --json
        """
        from ..broker_server.history.replay import replay_run
        from ..broker_server.history.summary import held_out_accuracy
        from ..exporter.deploy import deploy as write_model

        with output.progress("replaying the journal"):
            folder, coordinator = replay_run(run)
        weights, digest = coordinator.replica.evaluated()
        kind_of = "average" if coordinator.run.training.optimiser.ema else "last"
        facts = {"id": folder.path.name, "updates": str(coordinator.replica.index), "weights": kind_of}
        last = coordinator.evaluations[-1] if coordinator.evaluations else None
        accuracy = held_out_accuracy(last) if last else None
        if last and accuracy is not None and last["log_length"] == coordinator.replica.index:
            facts["accuracy"] = str(accuracy)
        report = write_model(
            folder.artifact_path,
            coordinator.manifest,
            coordinator.mask,
            weights,
            out,
            output=kind.value,
            facts=facts,
            overwrite=overwrite,
        )
        rows: list[tuple[str, object]] = [
            ("model", report.path),
            ("size", f"{report.size_bytes / 1024:.1f} KiB"),
            ("output", report.output),
            ("updates", coordinator.replica.index),
            ("non-zero weights", f"{report.nonzero} of {report.parameters}"),
            ("largest difference", f"{report.largest_difference:.2e} (limit {report.tolerance:.0e})"),
            ("weights", kind_of),
            ("weights digest", digest.hex()),
        ]
        output.table(("deployed", ""), rows)
        output.result(
            {
                "model": report.path,
                "size_bytes": report.size_bytes,
                "sha256": report.sha256.hex(),
                "output": report.output,
                "updates": coordinator.replica.index,
                "nonzero": report.nonzero,
                "parameters": report.parameters,
                "largest_difference": report.largest_difference,
                "tolerance": report.tolerance,
                "weights": kind_of,
                "weights_digest": digest.hex(),
            }
        )
