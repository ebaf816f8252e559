"""Writes the parts of the documentation that follow from the code: `python docs/generate.py [--check]`.

`cli.md` is made from the command line's own help. mkdocs also loads this file as a hook, which makes `index.md` from
the README.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
_INTRODUCTION = """\
# Command line

Every command takes `--json` (one JSON object on stdout, text for people on stderr) and `--debug` (tracebacks).

Settings come from the flag, then `FEDZO_*` in the environment, then the TOML file, then the hardware profile, then the
default; `--show-config` of a command that has settings prints each with its origin."""
REPOSITORY_FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")


def cli_reference() -> str:
    """The text of ``cli.md``."""
    import typer

    from fedzo.cli.app import app

    sections = [_INTRODUCTION, _exit_codes(), *_sections(typer.main.get_command(app), "fedzo")]
    return "\n\n".join(sections) + "\n"


def _exit_codes() -> str:
    from fedzo.protocol import errors

    meanings: dict[int, list[str]] = {0: ["done"], 1: ["unexpected error"], 2: ["wrong usage"], 130: ["interrupted"]}
    for name in errors.__all__:
        cls = getattr(errors, name)
        # A class that inherits its code is a case of its parent.
        if cls is not errors.FedzoError and cls.exit_code != cls.__base__.exit_code:
            meanings[cls.exit_code] = [cls.__doc__.split("\n")[0].rstrip(".")]
    rows = [f"| {code} | {'; '.join(lines)} |" for code, lines in sorted(meanings.items())]
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows])


def _sections(command: Any, path: str) -> Iterator[str]:
    yield f"## {path}"
    for block in _plain(command.help).split("\n\n"):
        heading, _, rest = block.partition("\n")
        yield f"```console\n{rest}\n```" if heading == "Example:" else block
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "_json", "_debug") or parameter.hidden:
            continue
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
        else:
            name = ", ".join([*parameter.opts, *parameter.secondary_opts])
            if not parameter.is_flag:
                name += f" {parameter.metavar or parameter.name.upper()}"
        rows.append(f"| `{name}` | {_plain(parameter.help)}{_default(parameter)} |")
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows])
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _sections(child, f"{path} {name}")


def _plain(text: str) -> str:
    """Help without the escapes that rich needs."""
    return text.replace(r"\[", "[")


def _default(parameter: Any) -> str:
    if parameter.required:
        return " Required."
    if parameter.default in (None, False, "", ()) or callable(parameter.default):
        return ""
    return f" Default: `{parameter.default}`."


def index_page(readme: str) -> str:
    """The README as a page of this site: links into ``docs/`` become local, files of the repository plain text."""
    page = readme.replace("](docs/", "](")
    for name in REPOSITORY_FILES:
        page = re.sub(rf"\[([^\]]+)\]\({re.escape(name)}\)", r"\1", page)
    return page


def on_files(files: Any, config: Any) -> Any:
    """Hook of mkdocs: adds ``index.md``."""
    from mkdocs.structure.files import File

    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=index_page(readme)))
    return files


def main() -> int:
    """Writes ``cli.md``, or with ``--check`` says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page is stale")
    check = parser.parse_args().check
    page, text = DOCS / "cli.md", cli_reference()
    stale = not page.exists() or page.read_text(encoding="utf-8") != text
    if stale and check:
        print(f"{page.name} is stale: run scripts/docs", file=sys.stderr)
        return 1
    if stale:
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
