"""Writes the parts of the documentation that follow from the code: `python docs/generate.py [--check]`.

`cli.md` is made from the command line's own help, the table of `boards.md` from the hardware profiles. mkdocs also
loads this file as a hook, which makes `index.md` from the README.
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
_START, _END = "<!-- generated: boards -->", "<!-- /generated -->"
REPOSITORY_FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")


def cli_reference() -> str:
    """The text of ``cli.md``."""
    import typer

    from fedzo.cli.app import app

    sections = [_INTRODUCTION, _exit_codes(), *_sections(typer.main.get_command(app), "fedzo"), *_device()]
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


def _device() -> Iterator[str]:
    """The board's own command, which is argparse's."""
    from fedzo.edge_runtime.__main__ import _parser

    def describe(parser: argparse.ArgumentParser) -> Iterator[str]:
        yield f"## {parser.prog}"
        if parser.description:
            yield parser.description
        rows, children = [], []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                children += list(action.choices.values())
            elif not isinstance(action, argparse._HelpAction):
                metavar = action.metavar or action.dest.upper()
                name = ", ".join(f"{o} {metavar}" if action.nargs != 0 else o for o in action.option_strings) or metavar
                rows.append(f"| `{name}` | {action.help} |")
        if rows:
            yield "\n".join(["| | |", "|---|---|", *rows])
        for child in children:
            yield from describe(child)

    yield from describe(_parser())


def _plain(text: str) -> str:
    """Help without the escapes that rich needs."""
    return text.replace(r"\[", "[")


def _default(parameter: Any) -> str:
    if parameter.required:
        return " Required."
    if parameter.default in (None, False, "", ()) or callable(parameter.default):
        return ""
    return f" Default: `{getattr(parameter.default, 'value', parameter.default)}`."


def boards_page(text: str) -> str:
    """The text of ``boards.md`` with its table renewed."""
    from fedzo.hardware_profiles import load_profile

    built_in = sorted((DOCS.parent / "hardware_profiles").glob("*.toml"))
    boards = [load_profile(path) for path in built_in]
    rows = [
        f"| `{b.name}` | {b.title} | {b.cpu_part} | {b.ram_total_mib} | {b.ram_budget_mib} | {len(b.unverified)} |"
        for b in boards
    ]
    heading = "| profile | board | cores | RAM, MiB | budget, MiB | unverified values |"
    table = "\n".join([heading, "|---|---|---|---|---|---|", *rows])
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n\n{table}\n\n{_END}{after}"


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
    """Writes the pages, or with ``--check`` says which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page is stale")
    check = parser.parse_args().check
    cli, boards = DOCS / "cli.md", DOCS / "boards.md"
    pages = {cli: cli_reference(), boards: boards_page(boards.read_text(encoding="utf-8"))}
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if check:
            print(f"{page.name} is stale: run scripts/docs", file=sys.stderr)
        else:
            page.write_text(pages[page], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
