"""Writes the parts of the documentation that follow from the code: `python docs/generate.py [--check]`.

`cli.md` is made from the command line's own help, the table of `boards.md` from the hardware profiles, that of
`operations.md` from the server's metrics, those of `results.md`, `experiments.md`, `claims.md`, `robustness.md` and the
README from the committed results. mkdocs also loads this file as a hook, which makes `index.md` from the README.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
BOARDS, RESULTS, README = DOCS / "boards.md", DOCS / "results.md", DOCS.parent / "README.md"
OPERATIONS = DOCS / "operations.md"
EXPERIMENTS, CLAIMS, ROBUSTNESS = DOCS / "experiments.md", DOCS / "claims.md", DOCS / "robustness.md"
ELSEWHERE = {"methods": CLAIMS, "attacks": ROBUSTNESS}
"""Experiments whose table is not on the page of experiments."""
FIGURES = {
    "engine": ("engine",),
    "structured": ("structured",),
    "figures": ("saliency", "replay"),
    "memory": ("memory", "footprint"),
    "fleet": ("fleet",),
}
LEARNERS = ("baseline", "decomfl", "split", "ours", "local", "backprop")
BUDGETS = {
    "60k": "60 k",
    "150k": "150 k",
    "300k": "300 k",
    "600k": "600 k",
    "1m5": "1.5 M",
    "3m": "3 M",
    "6m": "6 M",
    "30m": "30 M",
}
_INTRODUCTION = """\
# Command line

Every command takes `--json` (one JSON object on stdout, text for people on stderr) and `--debug` (tracebacks).

Settings come from the flag, then `FEDZO_*` in the environment, then the TOML file, then the hardware profile, then the
default; `--show-config` of a command that has settings prints each with its origin."""
_END = "<!-- /generated -->"
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
    if hasattr(command, "add_defaults"):
        command.add_defaults()
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


def renewed(text: str, name: str, block: str) -> str:
    """A page with what stands between the marks of ``name`` replaced."""
    start = f"<!-- generated: {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(_END)
    return f"{before}{start}\n\n{block}\n\n{_END}{after}"


def boards_table() -> str:
    """The built-in hardware profiles."""
    from fedzo.hardware_profiles import load_profile

    built_in = sorted((DOCS.parent / "hardware_profiles").glob("*.toml"))
    boards = [load_profile(path) for path in built_in]
    rows = [
        f"| `{b.name}` | {b.title} | {b.cpu_part} | {b.ram_total_mib} | {b.ram_budget_mib} | {len(b.unverified)} |"
        for b in boards
    ]
    heading = "| profile | board | cores | RAM, MiB | budget, MiB | unverified values |"
    return "\n".join([heading, "|---|---|---|---|---|---|", *rows])


def metrics_table() -> str:
    """What a server tells Prometheus, out of its registry."""
    from fedzo.broker_server.telemetry.metrics import ServerMetrics

    rows = [f"| `{name}` | {kind} | {label} | {text} |" for name, kind, label, text in ServerMetrics().described()]
    return "\n".join(["| metric | kind | label | |", "|---|---|---|---|", *rows])


def _result(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return data


def demo_table() -> str:
    """The runs of ``results/demo.json``, and their medians."""
    data = _result("demo")
    columns = (
        ("held-out accuracy", "accuracy", "{:.1%}"),
        ("rounds", "rounds", "{}"),
        ("loss queries, all devices", "queries", "{:,}"),
        ("bytes up per device and round", "bytes_up_per_device_round", "{:.0f}"),
        ("bytes down per device and round", "bytes_down_per_device_round", "{:.0f}"),
        ("peak RSS of a device, MiB", "device_peak_rss_mib", "{:.1f}"),
        ("seconds", "wall_s", "{:.0f}"),
    )
    rows = data["rows"]
    seeds = " | ".join(f"seed {row['seed']}" for row in rows)
    lines = [f"| | {seeds} | median |", "|---|" + "---:|" * (len(rows) + 1)]
    for title, key, style in columns:
        values = [row[key] for row in rows]
        cells = [style.format(value) for value in [*values, statistics.median(values)]]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    agree = ["yes" if row["digests_agree"] else "no" for row in rows]
    everybody = "yes" if set(agree) == {"yes"} else "no"
    lines.append(f"| same weights on server and devices | {' | '.join([*agree, everybody])} |")
    return "\n".join(lines)


def figures_table(*names: str) -> str:
    """The figures of some results."""
    lines = ["| benchmark | figure | value |", "|---|---|---:|"]
    if not all((DOCS / "results" / f"{name}.json").exists() for name in names):
        return "There is no committed result yet."
    for name in names:
        for figure, value in _result(name)["figures"].items():
            lines.append(f"| {name} | `{figure}` | {value:.4g} |")
    return "\n".join(lines)


def learning_tables() -> str:
    """Accuracies of ``results/learning.json`` by data set and budget, the other figures, and what each run pays."""
    if not (DOCS / "results" / "learning.json").exists():
        return "There is no committed result yet."
    data = _result("learning")
    figures, rows = data["figures"], data["rows"]
    learners = [name for name in LEARNERS if any(row["method"] == name for row in rows)]
    lines = [f"| data, SF | {' | '.join(learners)} |", "|---|" + "---:|" * len(learners)]
    for name in dict.fromkeys(row["data"] for row in rows):
        for budget, number in BUDGETS.items():
            found = [figures.get(f"{name}_{method}_{budget}") for method in learners]
            if any(value is not None for value in found):
                cells = ["" if value is None else f"{value:.1f} %" for value in found]
                lines.append(f"| {name}, {number} | {' | '.join(cells)} |")
    compared = [(key, value) for key, value in figures.items() if "_minus_" in key or key.startswith("sf_ratio")]
    if compared:
        lines += ["", "| figure | value |", "|---|---:|", *(f"| `{key}` | {value:.3g} |" for key, value in compared)]
    columns = (
        ("accuracy", "accuracy", "{:.1%}"),
        ("SF", "sample_forwards", "{:,.0f}"),
        ("rounds", "rounds", "{:,.0f}"),
        ("loss queries", "loss_queries", "{:,.0f}"),
        ("seconds", "seconds", "{:,.0f}"),
        ("scalars up", "scalars_per_device_round", "{:,.0f}"),
        ("bytes up", "bytes_up_per_device_round", "{:,.0f}"),
        ("bytes down", "bytes_down_per_device_round", "{:,.0f}"),
        ("planned MiB", "planned_mib", "{:.0f}"),
    )
    lines += ["", f"| run | seeds | {' | '.join(title for title, _, _ in columns)} |"]
    lines.append("|---|---:|" + "---:|" * len(columns))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["key"].rpartition("/")[0], []).append(row)
    for key, group in groups.items():
        cells = []
        for _, name, style in columns:
            values = [row[name] for row in group if row.get(name) is not None]
            cells.append(style.format(statistics.median(values)) if values else "")
        lines.append(f"| {key} | {len(group)} | {' | '.join(cells)} |")
    lacking = dict.fromkeys(key.rpartition("/")[0] for key in data["settings"]["absent"])
    if lacking:
        never = [f"`{key}`" for key in lacking if key not in groups]
        lines += ["", f"Not run yet: other seeds of {sum(key in groups for key in lacking)} of these rows"]
        lines[-1] += f", and {len(never)} rows: {', '.join(never)}." if never else "."
    return "\n".join(lines)


def results_page(text: str) -> str:
    """The page with all its tables renewed."""
    text = renewed(text, "learning", learning_tables())
    text = renewed(text, "demo", demo_table())
    for block, names in FIGURES.items():
        text = renewed(text, block, figures_table(*names))
    return text


def experiment_table(name: str) -> str:
    """The table of a committed experiment, or that it was not run."""
    from fedzo.experiments.experiment import find
    from fedzo.experiments.report import Report

    path = DOCS / "results" / "experiments" / f"{name}.json"
    if not path.exists():
        return f"Not run: there is no `{path.relative_to(DOCS.parent)}`."
    report = Report.decode(path.read_text(encoding="utf-8"), path.name)
    head, *rows = find(name).table(report)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    seeds = ", ".join(map(str, report.settings["seeds"]))
    origin = f"{report.machine['cpu']}, {report.machine['cores']} cores, {report.settings['date']}; seeds {seeds}."
    return "\n".join([*lines, "", origin])


def experiments_page(text: str) -> str:
    """The page with its tables renewed; some stand on pages of their own."""
    from fedzo.experiments.experiment import NAMES

    for name in NAMES:
        if name not in ELSEWHERE:
            text = renewed(text, name, experiment_table(name))
    return text


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
    read = (BOARDS, RESULTS, README, EXPERIMENTS, OPERATIONS, *ELSEWHERE.values())
    texts = {page: page.read_text(encoding="utf-8") for page in read}
    pages = {
        DOCS / "cli.md": cli_reference(),
        BOARDS: renewed(texts[BOARDS], "boards", boards_table()),
        RESULTS: results_page(texts[RESULTS]),
        OPERATIONS: renewed(texts[OPERATIONS], "metrics", metrics_table()),
        README: renewed(texts[README], "demo", demo_table()),
        EXPERIMENTS: experiments_page(texts[EXPERIMENTS]),
        **{page: renewed(texts[page], name, experiment_table(name)) for name, page in ELSEWHERE.items()},
    }
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if check:
            print(f"{page.name} is stale: run scripts/docs", file=sys.stderr)
        else:
            page.write_text(pages[page], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
