"""`fedzo simulate`: a run with virtual devices, without a broker or a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command import ConfigOption, ShowConfigOption, command
from .number_list import number_list
from .output import Output
from .run_options import OPTIONS, SETTINGS, with_run_options

__all__ = ["register"]

_WORLD = "Virtual devices"


WORLD = {
    "split": "world.split",
    "holdout": "world.holdout",
    "world_seed": "world.seed",
    "dropout": "world.dropout",
    "join_spread": "world.join_spread_s",
    "bandwidth": "world.bandwidth_kbit_s",
    "latency": "world.latency_s",
}
"""Options with a default, and what they set."""


def _settings_class() -> type[Any]:
    from .simulate_settings import SimulateSettings

    return SimulateSettings


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app, settings_class=_settings_class, settings={**SETTINGS, **WORLD})
    @with_run_options
    def simulate(
        output: Output,
        artifact: Annotated[Path | None, typer.Argument(metavar="ARTIFACT", help="Folder of fedzo export.")] = None,
        config: ConfigOption = None,
        show: ShowConfigOption = False,
        data: Annotated[
            Path | None, typer.Option("--data", help="Samples of all devices: what fedzo-device join takes.")
        ] = None,
        test_data: Annotated[
            Path | None, typer.Option("--test-data", help="The server's test set [default: the test part of --data].")
        ] = None,
        result: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result there, as JSON.")] = None,
        processes: Annotated[
            int | None, typer.Option(help="Processes that compute; 0: one a core; 1: this one alone.")
        ] = None,
        *,
        run_flags: dict[str, Any],
        split: Annotated[
            str | None,
            typer.Option(help="iid, shards:2, dirichlet:0.1 or natural (clients).", rich_help_panel=_WORLD),
        ] = None,
        clients: Annotated[
            str | None,
            typer.Option(
                help="natural: a .npy file with a client number a sample, if --data has no array client.",
                rich_help_panel=_WORLD,
            ),
        ] = None,
        holdout: Annotated[
            float | None, typer.Option(help="Part that devices keep for evaluation.", rich_help_panel=_WORLD)
        ] = None,
        world_seed: Annotated[
            int | None, typer.Option(help="Seed of split, boards and dropouts.", rich_help_panel=_WORLD)
        ] = None,
        dropout: Annotated[
            float | None, typer.Option(help="Probability to be lost, per device and round.", rich_help_panel=_WORLD)
        ] = None,
        join_spread: Annotated[
            float | None, typer.Option(help="Virtual seconds over which devices join.", rich_help_panel=_WORLD)
        ] = None,
        boards: Annotated[
            str | None,
            typer.Option(help="Profiles and shares: rpi-4b-4gb:0.5,rpi-zero-2w:0.5.", rich_help_panel=_WORLD),
        ] = None,
        bandwidth: Annotated[
            float | None, typer.Option(help="kbit/s of a link; 0: takes no time.", rich_help_panel=_WORLD)
        ] = None,
        latency: Annotated[
            float | None, typer.Option(help="Seconds that a message takes besides.", rich_help_panel=_WORLD)
        ] = None,
        mean: Annotated[
            str | None,
            typer.Option(
                metavar="X[,X...]",
                help="Subtracted from all inputs, after scaling bytes to 0..1.",
                rich_help_panel=_WORLD,
            ),
        ] = None,
        std: Annotated[
            str | None,
            typer.Option(metavar="X[,X...]", help="What all inputs are divided by.", rich_help_panel=_WORLD),
        ] = None,
        pad: Annotated[
            bool | None, typer.Option("--pad", help="Center smaller images in zeros.", rich_help_panel=_WORLD)
        ] = None,
    ) -> None:
        """Run a federation of virtual devices: the real machines, messages and graphs, on a virtual clock.

        Takes the training options of fedzo serve; --devices is the number of virtual devices. Times of boards come out
        of rates in their profiles, and no board was timed.

        Example:
            $ fedzo simulate artifact --data train.npz --devices 1000 --per-round 100 --split dirichlet:0.1
            $ fedzo simulate artifact --data train.npz --boards rpi-4b-4gb:0.5,rpi-zero-2w:0.5 --deadline 30
        """
        flags: dict[str, Any] = {
            "artifact": artifact,
            "data": data,
            "test_data": test_data,
            "output": result,
            "processes": processes,
            **run_flags,
            "world.split": split,
            "world.clients": clients,
            "world.holdout": holdout,
            "world.seed": world_seed,
            "world.dropout": dropout,
            "world.join_spread_s": join_spread,
            "world.boards": boards,
            "world.bandwidth_kbit_s": bandwidth,
            "world.latency_s": latency,
            "world.mean": number_list(mean, "--mean"),
            "world.std": number_list(std, "--std"),
            "world.pad": pad,
        }
        from .simulate_run import simulate_run

        options = {**OPTIONS, **{setting: f"--{name.replace('_', '-')}" for name, setting in WORLD.items()}}
        simulate_run(output, flags, config, options, show=show)
