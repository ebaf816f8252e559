"""Nothing is unpickled, evaluated or loaded as code: not from a peer, not from a file that a user is given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.board_fixture import PACKAGES, ROOT

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "copyreg"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}


def dotted(node: ast.expr) -> str:
    """``numpy.load`` for a chain of attributes, aliases of numpy included."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return {"np": "numpy"}.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def offences(text: str) -> Iterator[str]:
    """What a module does that it should not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
            yield from (f"line {node.lineno}: import {name}" for name in found)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                yield f"line {node.lineno}: from {node.module} import"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in FORBIDDEN_NAMES:
                yield f"line {node.lineno}: {name}()"
            if name == "numpy.load" and "allow_pickle" in options:
                value = options["allow_pickle"]
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"line {node.lineno}: numpy.load with allow_pickle"
            if name == "torch.load":
                value = options.get("weights_only", ast.Constant(False))
                if not (isinstance(value, ast.Constant) and value.value is True):
                    yield f"line {node.lineno}: torch.load without weights_only=True"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "import marshal as m", "np.load(f, allow_pickle=True)",
     "numpy.load(f, allow_pickle=x)", "torch.load(f)", "torch.load(f, weights_only=False)", "eval('1')", "exec(x)",
     "def f():\n    import _pickle"],
)  # fmt: skip
def test_it_would_be_noticed(text: str) -> None:
    assert list(offences(text))


def test_numpy_does_not_unpickle_by_itself() -> None:
    import inspect

    import numpy as np

    assert inspect.signature(np.load).parameters["allow_pickle"].default is False
