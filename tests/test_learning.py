"""The benchmark of learning: cells, runs in pieces, search, figures."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="fedzo[server] is not installed")
pytest.importorskip("sklearn", reason="fedzo[demo] is not installed")

from benchmarks.learning import settings as settings_module
from benchmarks.learning.__main__ import COMMITTED, _compact
from benchmarks.learning.build import run_settings
from benchmarks.learning.cells import Cell, selected, table
from benchmarks.learning.data import Parts, cifar, digits, fashion_mnist, prepare
from benchmarks.learning.figures import absent, figures, newest
from benchmarks.learning.jobs import read_rows
from benchmarks.learning.measure import measure
from benchmarks.learning.options import changes, numbers
from benchmarks.learning.search import best, points
from benchmarks.learning.settings import METHODS, resolved
from fedzo.protocol.errors import ConfigError, DataError, FedzoError
from tests.board_fixture import ROOT


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a search has found changes with time."""
    monkeypatch.setattr(settings_module, "FOUND", tmp_path / "found.json")


def cell(method: str = "ours", mask: str = "dense", world: str = "main", **more: Any) -> Cell:
    settings = {**resolved("digits", method, mask, world), "batch": 8, **more.pop("settings", {})}
    if "saliency.samples" in settings:
        settings["saliency.samples"] = 1
    return Cell(
        **{
            "data": "digits",
            "method": method,
            "mask": mask,
            "world": world,
            "budget": "60k",
            "seed": 0,
            "scale": 0.02,
            "settings": settings,
            **more,
        }
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.parametrize(
    ("method", "mask", "world"),
    [
        ("baseline", "dense", "main"),
        ("ours", "pruned80", "main"),
        ("local", "dense", "main"),
        ("decomfl", "dense", "iid50"),
        ("backprop", "dense", "main"),
        ("fedavg", "pruned80", "dirichlet01"),
    ],
)
def test_a_cell_spends_its_budget(work: Path, method: str, mask: str, world: str) -> None:
    asked = cell(method, mask, world)
    if world != "main":
        asked = dataclasses.replace(asked, scale=0.2)
    row = measure(asked, work, work)
    assert asked.is_of(json.loads(json.dumps(row)))
    assert row["key"] == f"digits/{method}/{mask}/{world}/60k/0"
    assert 0.0 < row["sample_forwards"] <= max(asked.budget_sf, row["sample_forwards"] / row["rounds"]) * 1.001
    assert 0.0 <= row["accuracy"] <= 1.0
    assert row["n_test"] == 360
    assert row["curve"][-1] == [row["sample_forwards"], row["accuracy"]]
    assert row["sparsity"] == pytest.approx(0.8 if mask == "pruned80" else 0.0, abs=1e-3)
    if method not in settings_module.TORCH:
        assert row["bytes_up_per_device_round"] <= 4096
        assert row["planned_mib"] > 10
        assert (row["pruning_sample_forwards"] > 0) == (mask != "dense")
    elif method == "fedavg":
        assert row["bytes_up_per_device_round"] > 40_000


def test_more_bytes_than_allowed_are_refused_before_the_run(work: Path) -> None:
    asked = cell("ours", budget="30m", settings={"tail_k": 2100})
    with pytest.raises(FedzoError, match=r"4,\d\d\d bytes a round, over 4,096"):
        measure(asked, work, work)


def test_runs_in_pieces(work: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    base = ["benchmarks.learning", "--budget-scale", "0.001", "--data-folder", str(work), "--work", str(work)]
    base += ["--resume", str(rows), "--jobs", "2", "--json"]
    first = command(*base, "--seeds", "0", "--only", "digits/ours/dense/main/1m5", "digits/backprop/dense/main/1m5")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert {row["method"] for row in report["rows"]} == {"ours", "backprop"}
    assert set(report["figures"]) == {"digits_ours_1m5", "digits_backprop_1m5"}
    assert report["settings"]["absent"] == []
    assert "cifar100" in report["settings"]["data_absent"]
    before = rows.read_text()
    rows.write_text(before + '{"key": "cut o')  # as if the machine had gone down
    again = command(*base, "--seeds", "0,1", "--only", "digits/ours/dense/main/1m5")
    assert again.returncode == 0, again.stderr
    assert rows.read_text().startswith(before)
    assert [row["seed"] for row in read_rows(rows)] == [0, 0, 1]
    listed = command(*base, "--seeds", "0,1", "--only", "digits/*/dense/main/1m5", "--list")
    assert listed.stdout.count("x digits") == 3
    assert "- digits/backprop/dense/main/1m5/1" in listed.stdout
    other = command(*base, "--seeds", "0", "--only", "digits/ours/dense/main/1m5", "--set", "k=2", "--report-only")
    assert json.loads(other.stdout)["settings"]["absent"] == ["digits/ours/dense/main/1m5/0"]


@pytest.mark.skipif(not COMMITTED.exists(), reason="there is no committed result yet")
def test_committed() -> None:
    found = command("benchmarks.learning", "--committed")
    assert found.returncode == 0
    report = json.loads(found.stdout)
    assert report == json.loads(COMMITTED.read_text())
    again = figures(report["rows"])
    assert {name: round(value, 6) for name, value in again.items()} == {
        name: round(value, 6) for name, value in report["figures"].items()
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "mnist/nothing"), "no cell matches"),
        (("--seeds", "one"), "whole numbers"),
        (("--seeds", "-1"), "below 0"),
        (("--set", "k"), "NAME=VALUE"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], said: str) -> None:
    found = command("benchmarks.learning", *arguments)
    assert found.returncode == ConfigError.exit_code
    assert said in found.stderr


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("--budget-scale", "nan"), ("--budget-scale", "-1")])
def test_numbers_that_cannot_be_are_wrong_usage(arguments: tuple[str, ...]) -> None:
    found = command("benchmarks.learning", *arguments, "--list")
    assert found.returncode == 2
    assert arguments[1] in found.stderr.splitlines()[-1]


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="no setting 'kk'"):
        run_settings(cell(settings={"kk": 3}), 1)
    with pytest.raises(ConfigError, match="none of"):
        resolved("digits", "magic", "dense", "main")


def test_a_search_chooses_by_the_median_on_the_validation_part(work: Path, tmp_path: Path) -> None:
    asked = cell("ours", part="validation")
    tried = points(asked, {})
    assert [each.settings["learning_rate"] for each in tried] == [0.002, 0.004, 0.008]
    assert len(points(asked, {"k": [1, 2], "batch": [8, 16]})) == 4
    rows = [
        {"key": "a/b/c/d/60k/0", "settings": {"learning_rate": rate}, "accuracy": accuracy}
        for rate, accuracies in ((1, (0.1, 0.9, 0.1)), (2, (0.5, 0.6, 0.4)), (3, (None, None, 1.0)))
        for accuracy in accuracies
    ]
    assert best(rows, ["learning_rate"]) == {"a/b/c/d": {"learning_rate": 2}}
    longer = [
        {**rows[0], "key": "a/b/c/d/300k/0", "settings": {"learning_rate": r}, "accuracy": r / 10} for r in (6, 7)
    ]
    alone = {**rows[0], "key": "a/b/c/d/600k/0", "settings": {"learning_rate": 9}, "accuracy": 0.99}
    assert best([*rows, *longer, alone], ["learning_rate"]) == {"a/b/c/d": {"learning_rate": 7}}
    options = ("--budget-scale", "0.02", "--budget", "60k", "--data-folder", str(work), "--work", str(work), "--json")
    found = command("benchmarks.learning.search", *options, "--only", "digits/baseline/dense/main", "--grid", "k=2,4")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["settings"]["best"]["digits/baseline/dense/main"]["k"] in (2, 4)
    assert len(report["rows"]) == 2
    kept = tmp_path / "search.jsonl"
    kept.write_text("".join(json.dumps({**row, "part": "validation"}) + "\n" for row in report["rows"]))
    again = command("benchmarks.learning.search", "--report-only", "--json", "--resume", str(kept))
    assert json.loads(again.stdout)["settings"]["best"] == {
        "digits/baseline/dense/main": {"k": report["settings"]["best"]["digits/baseline/dense/main"]["k"]}
    }
    refused = command("benchmarks.learning.search", *options, "--only", "digits/baseline")
    assert refused.returncode == ConfigError.exit_code


def test_what_was_found_counts_last_but_for_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"digits/ours/dense/main": {"k": 5}, "digits/ours/dense/iid50": {"k": 6}}))
    monkeypatch.setattr(settings_module, "FOUND", path)
    assert resolved("digits", "ours", "pruned80", "main")["k"] == 5
    assert resolved("digits", "ours", "dense", "dirichlet01")["k"] == 6
    assert resolved("cifar10", "ours", "dense", "main")["k"] == METHODS["ours"]["k"]
    assert resolved("digits", "ours", "dense", "main", {"ours.k": 7, "local.k": 8})["k"] == 7


def test_the_table_has_what_the_issue_names() -> None:
    cells = table([0, 1, 2])
    assert len({each.key for each in cells}) == len(cells)
    keys = {each.key for each in cells}
    for data in ("fashion_mnist", "digits", "cifar10"):
        for method in ("baseline", "ours", "local"):
            assert {f"{data}/{method}/dense/main/{budget}/2" for budget in ("1m5", "3m", "30m")} <= keys
    assert len(selected(cells, ["digits/ours/dense/main/1m5/0"])) == 1
    assert {each.data for each in selected(cells, ["cifar10"])} == {"cifar10"}


def row(method: str, accuracy: float, seed: int = 0, mask: str = "dense", world: str = "main", **more: Any) -> Any:
    budget = more.pop("budget", "1m5")
    made = Cell("digits", method, mask, world, budget, seed)
    return {"key": made.key, **dataclasses.asdict(made), "accuracy": accuracy, "sample_forwards": 100.0, **more}


def test_figures() -> None:
    rows = [
        row("baseline", 0.8, curve=[[10, 0.5], [80, 0.85], [100, 0.8]]),
        row("baseline", 0.9, 1, curve=[[100, 0.9]]),
        row("ours", 0.95, curve=[[8, 0.81], [100, 0.95]]),
        row("ours", 0.97, 1, curve=[[50, 0.95]]),
        row("ours", 0.9, 1, budget="60k", curve=[[20, 0.9]]),
        row("ours", 0.9, 0, "pruned80", curve=[]),
        row("ours", 0.6, world="dirichlet01", curve=[]),
        row("ours", 0.9, world="iid50", curve=[]),
    ]
    found = figures(rows)
    assert found["digits_baseline_1m5"] == pytest.approx(85)
    assert found["digits_ours_1m5"] == pytest.approx(96)
    assert found["sf_ratio_digits"] == pytest.approx((8 / 80 + 20 / 100) / 2)
    assert found["pruned80_minus_dense_digits"] == pytest.approx(90 - 95)  # of the seed that both have
    assert found["dirichlet01_minus_iid_digits"] == pytest.approx(-30)
    short = [rows[0], row("ours", 0.7, curve=[[100, 0.7]])]
    assert "sf_ratio_digits" not in figures(short)  # never reached


def test_the_same_accuracy_is_reached_though_curves_are_rounded() -> None:
    """340 of 360 right are 0.94444 on a curve."""
    rows = [
        row("baseline", 340 / 360, curve=[[50, 340 / 360], [100, 340 / 360]]),
        row("ours", 0.95, curve=[[10, 340 / 360], [100, 0.95]]),
    ]
    assert figures([_compact(each) for each in rows])["sf_ratio_digits"] == pytest.approx(10 / 50)


def test_rows_of_other_settings_do_not_count() -> None:
    asked = [Cell("digits", "ours", "dense", "main", "1m5", 0, settings={"k": 2})]
    rows = [row("ours", 0.9, settings={"k": 1}), row("ours", 0.0, settings={"k": 2}) | {"accuracy": None}]
    assert newest(rows, asked) == []
    assert absent([], asked) == ["digits/ours/dense/main/1m5/0"]
    assert [each["accuracy"] for each in newest(rows, asked, any_settings=True)] == [0.9]
    rows += [row("ours", 0.5, settings={"k": 2}), row("ours", 0.6, settings={"k": 2})]
    assert [each["accuracy"] for each in newest(rows, asked)] == [0.6]


def test_data(tmp_path: Path) -> None:
    made = digits()
    assert (len(made["x"]), len(made["xt"])) == (1437, 360)
    parts = Parts(prepare(tmp_path, "digits", "validation", tmp_path))
    assert (len(parts.x), len(parts.xt)) == (1150, 287)
    with pytest.raises(DataError, match=r"fashion_mnist\.npz"):
        prepare(tmp_path, "fashion_mnist", "test", tmp_path)
    np.savez(tmp_path / "cifar10.npz", x=made["x"], y=made["y"] + 5, xt=made["xt"], yt=made["yt"])
    with pytest.raises(DataError, match="labels"):
        prepare(tmp_path, "cifar10", "test", tmp_path)
    np.savez(tmp_path / "cifar10.npz", x=made["x"], y=made["y"])
    with pytest.raises(DataError, match="lacks"):
        prepare(tmp_path, "cifar10", "test", tmp_path)


def test_another_file_is_unpacked_again(tmp_path: Path) -> None:
    """A folder that cells share serves no data of a file that is not there any more."""
    made, work = digits(), tmp_path / "work"
    for folder, n in (("first", 30), ("second", 20)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "digits.npz", x=made["x"][:n], y=made["y"][:n], xt=made["xt"], yt=made["yt"])
        assert len(Parts(prepare(tmp_path / folder, "digits", "test", work)).x) == n
    assert prepare(tmp_path / "first", "digits", "test", work) == prepare(tmp_path / "first", "digits", "test", work)
    assert len(list((work / "data").iterdir())) == 2


def test_standard_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 5), ("t10k", 2)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, n]) + bytes(range(n)))
    found = fashion_mnist(tmp_path)
    assert (found["x"].shape, found["xt"].shape, found["y"].tolist()) == (
        (5, 1, 32, 32),
        (2, 1, 32, 32),
        [0, 1, 2, 3, 4],
    )
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        values = {b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), b"labels": [1, 2, 3]}
        (tmp_path / name).write_bytes(pickle.dumps(values))
    assert cifar(tmp_path, "cifar10")["x"].shape == (15, 3, 32, 32)
    with pytest.raises(DataError, match="no train"):
        cifar(tmp_path, "cifar100")


def test_numbers_and_changes() -> None:
    assert numbers("0,2") == [0, 2]
    assert changes(["a=1", "b=true", "c=text", "d.e=2.5"]) == {"a": 1, "b": True, "c": "text", "d.e": 2.5}
