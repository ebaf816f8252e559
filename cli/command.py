"""How a command joins the app: one decorator gives every command ``--json``, ``--debug`` and its `Output`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .broker_url import without_password
from .config import Resolved, default_values
from .output import Output

__all__ = [
    "ConfigOption",
    "SettingsCommand",
    "ShowConfigOption",
    "command",
    "group",
    "help_text",
    "help_without_command",
    "show_config",
]

_PANEL = "Every command"

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to stdout; text for people goes to stderr.", rich_help_panel=_PANEL
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error (or set FEDZO_DEBUG=1).", rich_help_panel=_PANEL),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="FEDZO_CONFIG",
        help="Settings in TOML; by default fedzo.toml, if there is one.",
    ),
]
ShowConfigOption = Annotated[
    bool, typer.Option("--show-config", help="Print every setting with the place it comes from, and stop.")
]


class MissingCommandError(typer.TyperException):
    """A group was called without one of its commands."""

    exit_code = 2

    def __init__(self, context: typer.Context) -> None:
        super().__init__(f"{context.command_path} needs a command")
        self.ctx = context


def help_text(docstring: str | None) -> str:
    """A docstring as help: a paragraph becomes one line, an ``Example:`` keeps its lines, brackets are literal."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    blocks = []
    for paragraph in paragraphs:
        first, *rest = paragraph.split("\n")
        # rich removes the common indentation of what follows the first paragraph, so there is none from the start.
        block = [first, *map(str.strip, rest)]
        blocks.append(("\n" if first.endswith(":") else " ").join(block))
    return _literal("\n\n".join(blocks))


def _literal(text: str) -> str:
    """The text with its brackets escaped, so that rich does not take them for markup; twice is once."""
    return re.sub(r"(?<!\\)\[", r"\\[", text)


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
        raise MissingCommandError(context)
    typer.echo(context.get_help())
    raise typer.Exit


class SettingsCommand(TyperCommand):
    """A command whose options have their defaults in a settings class, which is imported for the help alone.

    Attributes:
        settings_class: The class.
        settings: Dotted names of what the options set, by parameter.
    """

    settings_class: Callable[[], type[Any]]
    settings: Mapping[str, str]

    def add_defaults(self) -> None:
        """Put the defaults into the options' help, where nothing else is said there."""
        defaults = default_values(type(self).settings_class())
        for parameter in self.params:
            text = _default_text(defaults.get(self.settings.get(parameter.name or "", "")), parameter)
            said = getattr(parameter, "help", None)
            if text and said and "[default" not in said:
                parameter.help = f"{said.rstrip('.')} {_literal(f'[default: {text}]')}."  # type: ignore[attr-defined]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, with the defaults."""
        self.add_defaults()
        super().format_help(ctx, formatter)


def _default_text(value: Any, parameter: Any) -> str:
    if isinstance(value, bool):
        names = parameter.opts if value else parameter.secondary_opts
        return names[0] if names else ""
    if value is None or value == ():
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    settings_class: Callable[[], type[Any]] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to an app as a command.

    The function's first parameter is its `Output`; the others are typer's. Its docstring is the help: a summary, and an
    ``Example:`` with command lines that start with ``$``.

    Args:
        app: The app or group that gets the command.
        name: Its name, if not the function's with hyphens.
        settings_class: Gives the class that has the defaults of its options.
        settings: What the options set there, by parameter.
    """
    cls: type[TyperCommand] = TyperCommand
    if settings_class is not None:
        body = {"settings_class": staticmethod(settings_class), "settings": settings or {}}
        cls = type("SettingsCommand", (SettingsCommand,), body)

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
        for parameter in own:
            for info in typing.get_args(parameter.annotation)[1:]:
                if getattr(info, "help", None):
                    info.help = _literal(info.help)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect honours it
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__ = function.__name__
        app.command(name, cls=cls, help=help_text(function.__doc__))(run)
        return function

    return register


def show_config(output: Output, resolved: Resolved[Any]) -> None:
    """What ``--show-config`` prints: every setting, its value and its origin."""
    rows = [
        (name, without_password(value) if isinstance(value, str) else value, origin)
        for name, value, origin in resolved.rows()
    ]
    output.table(("setting", "value", "origin"), rows)
    output.result({"settings": {name: {"value": value, "origin": str(origin)} for name, value, origin in rows}})
