"""The `fedzo` command line: its commands and the options before them. Importing it needs typer, nothing heavier."""

from __future__ import annotations

from typing import Annotated

import typer

from ..edge_runtime.installation.versions import installed_versions
from . import (
    broker,
    bundle,
    credentials,
    deploy,
    doctor,
    export,
    inspect,
    plan,
    profiles,
    replay,
    serve,
    simulate,
    status,
)
from .command import DebugOption, JsonOption, help_text, help_without_command
from .output import Output

__all__ = ["app"]

app = typer.Typer(
    name="fedzo",
    help=help_text(
        """Prune and train neural networks on fleets of low-memory boards, by forward passes only, over MQTT.

        Boards run the small `fedzo-device`; this command exports models, runs the server and looks after both.

        Example:
            $ fedzo export lenet5 --input 1x32x32 --classes 10 -o artifact
            $ fedzo serve artifact --devices 8
        """
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
export.register(app)
serve.register(app)
status.register(app)
inspect.register(app)
replay.register(app)
simulate.register(app)
deploy.register(app)
bundle.register(app)
profiles.register(app)
plan.register(app)
doctor.register(app)
broker.register(app)
credentials.register(app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the installed versions, and stop.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Options that stand before a command."""
    output = context.ensure_object(Output)
    output.json |= json
    output.debug |= debug
    if show_version:
        versions = installed_versions("torch", "onnx")
        output.text("\n".join(f"{name} {number}" for name, number in versions.items()))
        output.result({"versions": versions})
        raise typer.Exit
    help_without_command(context)
