"""`fedzo deploy`: from a run to a plain inference model."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .output import Output

if TYPE_CHECKING:
    from ..broker_server.history.run_folder import RunFolder
    from ..exporter.deploy import InputValues

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
        What the model's input must be is printed, and written into the file as fedzo.input.

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
        updates, planned = coordinator.replica.index, coordinator.run.training.rounds
        inputs = _inputs(folder)
        kind_of = "average" if coordinator.run.training.optimiser.ema else "last"
        facts = {"id": folder.path.name, "updates": str(updates), "weights": kind_of}
        last = coordinator.evaluations[-1] if coordinator.evaluations else None
        accuracy = held_out_accuracy(last) if last else None
        if last and accuracy is not None and last["log_length"] == updates:
            facts["accuracy"] = str(accuracy)
        report = write_model(
            folder.artifact_path,
            coordinator.manifest,
            coordinator.mask,
            weights,
            out,
            output=kind.value,
            facts=facts,
            inputs=inputs,
            overwrite=overwrite,
        )
        if updates < planned:
            what = f"not done: fedzo serve --resume {run} goes on with it" if updates else "not trained yet"
            output.warn(f"{updates} of {planned} updates: {what}")
        rows: list[tuple[str, object]] = [
            ("model", report.path),
            ("size", f"{report.size_bytes / 1024:.1f} KiB"),
            ("input", inputs.text(coordinator.manifest.input_shape)),
            ("output", report.output),
            ("updates", f"{updates} of {planned}"),
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
                "input": inputs.text(coordinator.manifest.input_shape),
                "input_mean": inputs.mean,
                "input_std": inputs.std,
                "output": report.output,
                "updates": updates,
                "updates_planned": planned,
                "nonzero": report.nonzero,
                "parameters": report.parameters,
                "largest_difference": report.largest_difference,
                "tolerance": report.tolerance,
                "weights": kind_of,
                "weights_digest": digest.hex(),
            }
        )


def _inputs(folder: RunFolder) -> InputValues:
    """How the server's own test set was made into inputs; without one, only the boards know how theirs were."""
    from ..broker_server.history.run_folder import PLACE_NAME
    from ..exporter.deploy import InputValues

    try:
        place = json.loads((folder.path / PLACE_NAME).read_text())
        if not place.get("test_data"):
            return InputValues()
        mean, std = (tuple(map(float, place.get(name, ()))) for name in ("test_mean", "test_std"))
        return InputValues(mean, std, bool(place.get("test_pad")))
    except (OSError, ValueError, TypeError, AttributeError):
        return InputValues()
