"""The architecture as a test: who may import whom, how large a module may be, what does not get committed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.board_fixture import PACKAGES, ROOT

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TEST_MODULES = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400

# What each package may import: other packages of fedzo, and third parties (None: any). The standard
# library is free, but for protocol.
ALLOWED: dict[str, tuple[set[str], set[str] | None]] = {
    "protocol": (set(), {"numpy"}),
    "hardware_profiles": ({"protocol"}, {"tomli"}),
    "edge_runtime": ({"protocol", "hardware_profiles"}, {"numpy", "onnxruntime", "paho", "PIL", "tomli"}),
    "exporter": ({"protocol", "hardware_profiles"}, None),
    "broker_server": ({"protocol", "hardware_profiles", "edge_runtime", "exporter"}, None),
    "simulation": ({"protocol", "hardware_profiles", "edge_runtime", "broker_server"}, None),
    "experiments": ({"protocol", "hardware_profiles", "edge_runtime", "exporter", "simulation"}, None),
    "cli": ({"protocol", "hardware_profiles", "edge_runtime", "exporter", "broker_server", "simulation"}, None),
}
# protocol/ computes: it reads no file, socket, clock, environment or process.
IMPURE = {
    *(
        "asyncio",
        "datetime",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "queue",
        "random",
        "secrets",
        "select",
    ),
    *(
        "selectors",
        "shutil",
        "signal",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "urllib",
    ),
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import that can run, anywhere in a file; relative ones resolved to ``fedzo.…``."""
    package = ["fedzo", *path.relative_to(ROOT).parts[:-1]]
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    guards = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    never_run = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in nodes:
        if node in never_run:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            dotted = ".".join(part for part in (base, node.module) if part)
            # `from .. import protocol` names packages, not members.
            yield from (
                (f"{dotted}.{alias.name}" if dotted == "fedzo" else dotted, node.lineno) for alias in node.names
            )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_package_has_its_rule() -> None:
    assert set(PACKAGES) == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    packages, third_parties = ALLOWED[package]
    for dotted, line in imports(path):
        top, *rest = dotted.split(".")
        place = f"{name_of(path)}:{line}"
        if top == "fedzo":
            assert rest, f"{place}: import a package of fedzo, by a relative import"
            assert rest[0] == package or rest[0] in packages, f"{place}: {package} must not import {rest[0]}"
        else:
            assert top not in PACKAGES, f"{place}: {top} is installed as fedzo.{top}; import it relatively"
            foreign = top not in sys.stdlib_module_names and top != "__future__"
            if foreign and third_parties is not None:
                assert top in third_parties, f"{place}: {package} must not import {top}"
            if package == "protocol":
                assert top not in IMPURE, f"{place}: protocol must not import {top}"


@pytest.mark.parametrize("path", [*MODULES, *TEST_MODULES], ids=name_of)
def test_project_imports_are_of_one_kind(path: Path) -> None:
    """Packages import each other relatively; tests use the installed names."""
    inside = path in MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            top = (node.module or "").split(".")[0]
            assert not (inside and top == "fedzo"), f"{name_of(path)}:{node.lineno}: import it relatively"
            assert top not in set(PACKAGES), f"{name_of(path)}:{node.lineno}: from fedzo.{node.module} import …"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; split what does not belong together"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed: list[str] = []
    defined: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        defined |= names
        if "__all__" in names:
            assert isinstance(node, (ast.Assign, ast.AnnAssign))
            assert node.value is not None
            listed = ast.literal_eval(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            defined |= {alias.asname or alias.name for alias in node.names}
    # Their order is held by ruff (RUF022).
    assert len(listed) == len(set(listed))
    assert set(listed) <= defined


def test_nothing_is_left_for_later() -> None:
    # Spelled apart, so that this file passes.
    words = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in [*MODULES, *TEST_MODULES]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if words.search(line)
    ]
    assert not found


@pytest.mark.parametrize("module", ["fedzo.cli", "fedzo.edge_runtime"])
def test_help_imports_no_heavy_library(module: str) -> None:
    # --help ends in SystemExit, inside or outside of main.
    script = (
        "import runpy, sys\nsys.argv = ['program', '--help']\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('heavy:', *sorted({'torch', 'onnx', 'onnxruntime', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
