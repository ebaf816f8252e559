"""What a command prints: data to stdout, text for people to stderr; with ``--json``, stdout is one JSON object.

Text may hold what a device sent, so control characters are shown, never executed by the terminal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..edge_runtime.logs import LogFormat, LogLevel, Logs

__all__ = ["Output"]

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Output:
    """The two streams of a command.

    Attributes:
        json: stdout is for one JSON object.
        debug: Errors come with their traceback.
        closed: `result` has been called.
        logs: What is logged, once :meth:`start_logs` was called.
        arguments: The command line, without the program's name.
    """

    def __init__(self, *, json: bool = False, debug: bool = False) -> None:
        self.json = json
        self.debug = debug
        self.closed = False
        self.logs: Logs | None = None
        self.arguments: tuple[str, ...] = ()

    def start_logs(self, form: LogFormat, file: Path | None, level: LogLevel | None) -> None:
        """Log from now on; text for people goes into the log as well, and where stderr is for JSON, nowhere else.

        Raises:
            ConfigError: The file cannot be written.
        """
        from ..edge_runtime.logs import Logs

        self.close()
        self.logs = Logs(form, file, level)

    def close(self) -> None:
        """End the log."""
        if self.logs is not None:
            self.logs.close()

    @property
    def _is_silent(self) -> bool:
        return self.logs is not None and self.logs.takes_stderr

    @cached_property
    def console(self) -> Console:
        """stderr as a rich console, for live displays; it honours ``NO_COLOR`` and knows whether it is a terminal."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    @property
    def interactive(self) -> bool:
        """Whether a person watches: stderr is a terminal and nobody asked for JSON."""
        return not self.json and not self._is_silent and self.console.is_terminal

    def say(self, text: str, *, style: str = "", level: LogLevel = "info") -> None:
        """One line for people, to stderr; ``style`` is rich's (``bold``, ``green``), ``level`` the log's."""
        if self.logs is not None:
            self.logs.note(text, level=level)
        if not self._is_silent:
            self.console.print(text.translate(_CONTROL), style=style)

    def warn(self, text: str) -> None:
        """One line about something that will surprise, to stderr."""
        self.say(f"warning: {text}", style="yellow", level="warning")

    def error(self, message: str, *, hint: str = "", kind: str = "", exit_code: int = 1) -> None:
        """``error:`` and ``hint:`` lines on stderr; with ``json`` also the object of a failed command.

        Args:
            message: One line.
            hint: The next action, one line.
            kind: Name of the exception's class.
            exit_code: What the process will end with.
        """
        self.say(f"error: {message}", style="bold red", level="error")
        if hint:
            self.say(f"hint: {hint}")
        if self.json and not self.closed:
            self.result({"error": {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}})

    def result(self, data: Mapping[str, Any]) -> None:
        """The command's answer, for machines: with ``json`` one object on stdout, else nothing.

        Paths and enumerations become text, dataclasses objects, numpy scalars and arrays numbers and lists; JSON has no
        infinity and no NaN: they become ``null``.

        Raises:
            RuntimeError: The command already gave an answer.
        """
        if self.closed:
            raise RuntimeError("a command gives one result")
        self.closed = True
        if self.json:
            print(json.dumps(_plain(data), ensure_ascii=False, allow_nan=False), flush=True)

    def text(self, text: str) -> None:
        """The command's answer, for people: lines on stdout; with ``json`` on stderr, out of the way."""
        if self.json and self.logs is not None and self._is_silent:
            self.logs.note(text)
            return
        print(text.translate(_CONTROL), file=sys.stderr if self.json else sys.stdout, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
        """A table where `text` goes: aligned on a terminal, tab-separated in a pipe (for ``cut`` and ``awk``)."""
        from rich.cells import cell_len, set_cell_size

        if title:
            self.say(title, style="bold")
        cells = [[_cell(value) for value in row] for row in [columns, *rows]]
        if (sys.stderr if self.json else sys.stdout).isatty():
            widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
            lines = ["  ".join(map(set_cell_size, row, widths)).rstrip() for row in cells]
            lines.insert(1, "  ".join("─" * width for width in widths))
        else:
            lines = ["\t".join(row) for row in cells]
        self.text("\n".join(lines))

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A progress bar on a terminal, one line elsewhere.

        Args:
            description: What is going on.
            total: Steps to go; ``None`` when unknown.

        Yields:
            ``advance(steps=1, description=...)``, to call as the work goes on.
        """
        if not self.interactive:
            self.say(description)
            yield lambda *_, **__: None
            return
        from rich.progress import Progress

        with Progress(console=self.console, transient=True) as bar:
            task = bar.add_task(description.translate(_CONTROL), total=total)

            def advance(steps: int = 1, description: str = "") -> None:
                bar.update(task, advance=steps, description=description.translate(_CONTROL) or None)

            yield advance


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("\t", " ").translate(_CONTROL)


def _plain(value: Any) -> Any:
    """The value as JSON types."""
    if value is None or isinstance(value, (bool, int, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy, which this module does not import
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")
