"""How a command joins the app: one decorator gives every command ``--json``, ``--debug`` and its `Output`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import Resolved
from .output import Output

__all__ = ["ConfigOption", "ShowConfigOption", "command", "group", "help_text", "help_without_command", "show_config"]

_PANEL = "Every command"

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to stdout; text for people goes to stderr.", rich_help_panel=_PANEL
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an error; FEDZO_DEBUG=1 does the same.", rich_help_panel=_PANEL
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="FEDZO_CONFIG",
        help="Settings in TOML; fedzo.toml of this folder by default.",
    ),
]
ShowConfigOption = Annotated[
    bool, typer.Option("--show-config", help="Print every setting with the place it comes from, and stop.")
]


class MissingCommandError(typer.TyperException):
    """A group was called without one of its commands."""

    exit_code = 2


def help_text(docstring: str | None) -> str:
    """A docstring as help: each paragraph becomes one line, indented blocks (examples) keep theirs; brackets are literal."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    blocks = [
        # rich would take away the indentation of the last blocks only: no block has any.
        textwrap.dedent(paragraph) if paragraph.startswith(" ") else " ".join(paragraph.split("\n"))
        for paragraph in paragraphs
    ]
    return "\n\n".join(blocks).replace("[", r"\[")


def group(app: typer.Typer, name: str, docstring: str) -> typer.Typer:
    """Adds a group of commands, which prints its help when no command follows, and returns it."""
    commands = typer.Typer(name=name, help=help_text(docstring))

    @commands.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        help_without_command(context)

    app.add_typer(commands)
    return commands


def help_without_command(context: typer.Context) -> None:
    """Prints the help of a group that was called without a command.

    Raises:
        MissingCommandError: stdout is to be JSON, which help is not.
    """
    if context.invoked_subcommand is not None:
        return
    if context.ensure_object(Output).json:
        raise MissingCommandError(f"{context.command_path} needs a command")
    typer.echo(context.get_help())
    raise typer.Exit


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    r"""Adds a function to an app as a command.

    The function's first parameter is its `Output`; the others are typer's. Its docstring is the help and ends in an
    example::

        @command(app)
        def inspect(output: Output, artifact: Annotated[Path, typer.Argument(help="Artifact folder.")]) -> None:
            \"""Say what an artifact holds.

            Example:

                $ fedzo inspect lenet5.fedzo
            \"""

    Args:
        app: The app or group that gets the command.
        name: Its name, if not the function's with hyphens.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter("_context", keyword, annotation=typer.Context),
            inspect.Parameter("_json", keyword, default=False, annotation=JsonOption),
            inspect.Parameter("_debug", keyword, default=False, annotation=DebugOption),
        ]

        def run(*, _context: typer.Context, _json: bool, _debug: bool, **arguments: Any) -> None:
            output = _context.ensure_object(Output)
            output.json |= _json
            output.debug |= _debug
            function(output, **arguments)

        # typer reads the parameters from here, as it would from the function's own signature.
        parameters = [parameter.replace(kind=keyword) for parameter in own] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect honours it
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__ = function.__name__
        app.command(name, help=help_text(function.__doc__))(run)
        return function

    return register


def show_config(output: Output, resolved: Resolved[Any]) -> None:
    """What ``--show-config`` prints: every setting, its value and its origin."""
    rows = list(resolved.rows())
    output.table(("setting", "value", "origin"), rows)
    output.result({"settings": {name: {"value": value, "origin": str(origin)} for name, value, origin in rows}})
