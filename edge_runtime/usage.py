"""Wrong usage of ``fedzo-device``: which command's, what to do, and with ``--json`` one object on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["EXIT_USAGE", "Parser"]

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """A parser, also of a single command, that ends a program as ``fedzo`` does.

    Attributes:
        as_json: Whether stdout is to get JSON; said before parsing, which may be what fails.
    """

    as_json = False

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            SystemExit: With 2; usage, error and hint of the command in question are on stderr.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        Parser.as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        options, unknown = self.parse_known_args(words)
        options.json = options.json or Parser.as_json  # also before the command
        for word in unknown:
            if word != "--json":
                parser: Parser = getattr(options, "parser", self)
                parser.error(f"{'no such option' if word.startswith('-') else 'unexpected argument'}: {word}")
        return options

    def error(self, message: str) -> NoReturn:
        """As the base class, with a hint; and with JSON if that is wanted."""
        hint = f"{self.prog} --help"
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\nhint: {hint}\n")
        if Parser.as_json:
            error: dict[str, Any] = {"kind": "UsageError", "message": message, "hint": hint, "exit_code": EXIT_USAGE}
            sys.stdout.write(json.dumps({"error": error}, ensure_ascii=False, sort_keys=True) + "\n")
        sys.exit(EXIT_USAGE)
