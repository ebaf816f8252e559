"""`fedzo export`: from a model to an artifact folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .output import Output

__all__ = ["parse_shape", "register"]


def parse_shape(text: str) -> tuple[int, ...]:
    """``3x32x32`` as numbers.

    Raises:
        typer.BadParameter: It is no shape.
    """
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or any(n < 1 for n in shape):
        raise typer.BadParameter(f"{text!r} is no shape; write channels first, such as 1x32x32 or 9x128")
    return shape


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def export(
        output: Output,
        model: Annotated[
            str,
            typer.Argument(help="lenet5, resnet8, resnet20, resnet32, resnet56, cnn1d, or your own module:function."),
        ],
        out: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Artifact folder to write.")],
        input_shape: Annotated[
            str, typer.Option("--input", metavar="CxHxW", help="Shape of one sample, channels first.")
        ] = "1x32x32",
        classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
        sparsity: Annotated[
            float, typer.Option(help="Fraction of the weights that pruning will remove; 0 for none.")
        ] = 0.8,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights.")] = 1,
        keep_channels: Annotated[
            float, typer.Option(metavar="FRACTION", help="Fraction of the channels and units to keep; 1 for all.")
        ] = 1.0,
        channel_scores: Annotated[
            str,
            typer.Option(
                metavar="NAME",
                help="Which stay: uniform (the same fraction of every layer), or over all layers the best by"
                " diagonal (forward passes on Gaussian inputs), magnitude or random scores.",
            ),
        ] = "uniform",
        local_heads: Annotated[
            bool,
            typer.Option("--local-heads", help="Add a small head and loss to every stage, for local and local-node."),
        ] = False,
        sections: Annotated[
            int,
            typer.Option(
                min=2,
                max=8,
                help="Cut the network into so many sections at most, whose probes start from stored features with the"
                " estimator split.",
            ),
        ] = 2,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    ) -> None:
        """Turn a model into an artifact: ONNX graphs whose weights are inputs, with hashes and a known answer.

        Example:
            $ fedzo export lenet5 --input 1x32x32 --classes 10 --sparsity 0.8 -o artifact
            $ fedzo export my_package.models:build --input 9x128 --classes 6 -o artifact
            $ fedzo export resnet20 --input 3x32x32 --keep-channels 0.5 -o artifact
        """
        from ..exporter.artifact import export_artifact
        from ..exporter.narrow import ChannelSelection
        from ..protocol.errors import ConfigError

        shape = parse_shape(input_shape)
        channels = ChannelSelection.of(keep_channels, channel_scores)
        if channels.keep == 1.0 and channels.scores != "uniform":
            raise ConfigError(
                f"channels are ranked by {channel_scores!r}, but all of them stay", hint="add --keep-channels 0.5"
            )
        with output.progress(f"exporting {model}"):
            manifest = export_artifact(
                model,
                shape,
                classes,
                sparsity,
                seed,
                out,
                channels=channels,
                local_heads=local_heads,
                sections=sections,
                overwrite=overwrite,
            )
        size, prunable = sum(graph.size for graph in manifest.graphs), manifest.layout.maskable_size
        if sparsity > 0 and prunable < manifest.layout.size / 2:
            output.warn(
                f"only {prunable} of {manifest.layout.size} parameters can be pruned: "
                f"a sparsity of {sparsity:g} removes {round(sparsity * prunable)} of them"
            )
        rows: list[tuple[str, object]] = [
            ("model", manifest.model),
            ("parameters", manifest.layout.size),
            ("prunable", f"{prunable} of {manifest.layout.size}; the others are never pruned"),
            ("sparsity", manifest.sparsity),
            ("scoring passes", 2 + sum(unit.n_units for unit in manifest.units if not unit.is_output)),
            ("graphs", f"{len(manifest.graphs)}, {size / 1024:.1f} KiB"),
            ("golden loss", f"{manifest.golden.mean_loss:.6f}"),
            ("folder", out),
        ]
        if manifest.sections is not None:
            costs = [manifest.sections.cost(number) for number in range(len(manifest.sections))]
            rows.insert(-1, ("sections", ", ".join(f"{cost:.1%}" for cost in costs) + " of the network each probe"))
        structure, work = manifest.structure, manifest.work
        narrowed: dict[str, object] = {}
        if structure is not None and work is not None:
            channels_kept = [(len(layer.kept), layer.n_units) for layer in structure.layers]
            narrowed = {
                "channels": sum(kept for kept, _ in channels_kept),
                "whole_channels": sum(whole for _, whole in channels_kept),
                "whole_parameters": structure.parameters,
                "work_ratio": work.sample_multiply_accumulates / structure.multiply_accumulates,
            }
            rows[1] = ("parameters", f"{manifest.layout.size} of {structure.parameters}")
            rows[2:2] = [
                ("channels", f"{narrowed['channels']} of {narrowed['whole_channels']}, {structure.scores}"),
                ("work", f"{narrowed['work_ratio']:.1%} of the multiplications"),
            ]
        output.table(("artifact", ""), rows)
        output.result(
            {
                "model": manifest.model,
                "folder": out,
                "parameters": manifest.layout.size,
                "prunable": prunable,
                "sparsity": manifest.sparsity,
                "graph_bytes": size,
                "golden_loss": manifest.golden.mean_loss,
                "graphs": {graph.name: graph.sha256.hex() for graph in manifest.graphs},
                **narrowed,
            }
        )
