"""Entry point of `fedzo`: runs the app and turns every error into one line, a hint and an exit code.

Only the standard library is imported here, so that a board without the ``server`` extra gets an answer.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from ..protocol.errors import FedzoError
from .output import Output

__all__ = ["main"]

EXIT_UNEXPECTED: Final = 1
EXIT_CONFIG: Final = 3
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: Without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0, 2 for wrong usage, a `FedzoError`'s own, 130 after an interrupt, 1 for anything else.
    """
    if any(importlib.util.find_spec(name) is None for name in ("typer", "rich")):
        print("error: this is a board's installation, the fedzo command needs its server part", file=sys.stderr)
        print("hint: pip install 'fedzo[server]'; on a board, use fedzo-device", file=sys.stderr)
        return EXIT_CONFIG

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # Known before the parser runs, which may be what fails.
    output = Output(
        json="--json" in options, debug="--debug" in options or os.environ.get("FEDZO_DEBUG", "") not in ("", "0")
    )
    output.arguments = tuple(arguments)
    try:
        return _run(arguments, output)
    except KeyboardInterrupt:
        output.error("interrupted", kind="KeyboardInterrupt", exit_code=EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`fedzo ... | head`); keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except FedzoError as error:
        _traceback(output)
        output.error(error.message, hint=error.hint, kind=type(error).__name__, exit_code=error.exit_code)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort of a program
        _traceback(output)
        output.error(
            f"unexpected {type(error).__name__}: {error}",
            hint="" if output.debug else "--debug shows the traceback",
            kind=type(error).__name__,
            exit_code=EXIT_UNEXPECTED,
        )
        return EXIT_UNEXPECTED
    finally:
        output.close()


def _run(arguments: list[str], output: Output) -> int:
    import typer

    from .app import app

    try:
        code = app(arguments, prog_name="fedzo", standalone_mode=False, obj=output)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "fedzo"
        message = _refusal(error) or " ".join(error.format_message().split())
        output.error(
            message[:1].lower() + message[1:],
            hint=f"{path} --help",
            kind=type(error).__name__,
            exit_code=error.exit_code,
        )
        return error.exit_code
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0)


_WANTED: Final = {
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
}


def _refusal(error: Exception) -> str:
    """What is wrong with the value of an option, with the value; empty where the parser's own text says it."""
    cause, options = error.__cause__, getattr(getattr(error, "param", None), "opts", None)
    if type(cause).__name__ != "ValidationError" or not options:
        return ""
    (first, *_) = cause.errors()  # type: ignore[union-attr]  # pydantic's, which is not imported here
    context = first.get("ctx", {})
    if first["type"] == "value_error":
        return f"{options[0]}: {context['error']}".rstrip(".")
    if first["type"] not in _WANTED:
        return ""
    return f"{options[0]} is {first['input']!r}, it must be {_WANTED[first['type']].format(**context)}"


def _traceback(output: Output) -> None:
    if output.debug:
        traceback.print_exc()
