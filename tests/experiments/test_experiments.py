"""Every experiment runs in a tiny setting, its JSON holds what is promised, and its figure and table are made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedzo.experiments.__main__ import main
from fedzo.experiments.experiment import NAMES, find
from fedzo.experiments.report import KEYS, Report
from tests.board_fixture import ROOT

TINY: dict[str, list[str]] = {
    "saliency-inputs": ["--devices", "2", "--samples", "4", "--splits", "dirichlet:1", "iid"],
    "gradient-error": ["--sparsities", "0", "0.8", "--k", "4", "16", "--steps", "0", "2"],
    "wire-bytes": ["--models", "lenet5"],
    "federation-error": ["--devices", "1", "2", "--k", "4", "--splits", "iid", "--steps", "2"],
    "best-k": ["--queries", "24", "--devices", "2", "--k", "1", "2", "--rates", "1e-2", "--sparsities", "0", "0.8"],
    "input-scale": [
        *("--models", "lenet5", "--samples", "4", "--counts", "2", "--steps", "2"),
        *("--sigmas", "1e-3", "--rounds", "1"),
    ],
    "deeper-nets": ["--models", "lenet5", "--repeats", "1"],
    "attacks": [
        *("--rules", "mean", "median", "--attacks", "sign flip", "trim attack"),
        *("--devices", "5", "--hostile", "2", "--rounds-scale", "0.03", "--skew", "iid"),
    ],
}
OWN_TESTS = {"methods"}  # it needs the learning benchmark's cells


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Report, Path]]:
    return {}


def run(name: str, results: dict[str, tuple[Report, Path]], folder: Path, capsys: pytest.CaptureFixture[str]) -> Report:
    """The report of a tiny run; each is made once."""
    if name not in results:
        picture = folder / "figure.png"
        assert main([name, "--seeds", "1", "--json", "--figure", str(picture), *TINY[name]]) == 0
        results[name] = Report.decode(capsys.readouterr().out, name), picture
    return results[name][0]


def test_every_experiment_is_tried() -> None:
    assert set(TINY) | OWN_TESTS == set(NAMES)


@pytest.mark.parametrize("name", TINY)
def test_report_figure_and_table(
    name: str,
    results: dict[str, tuple[Report, Path]],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = run(name, results, tmp_path_factory.mktemp(name), capsys)
    assert {"cpu", "cores", "numpy", "onnxruntime"} <= set(report.machine)
    assert {"date"} <= set(report.settings)
    assert report.rows
    assert len({tuple(row) for row in report.rows}) == 1, "all rows have the same keys"
    assert report.figures
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in report.figures.values())
    picture = results[name][1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    table = find(name).table(report)
    assert len(table) > 1
    assert {len(row) for row in table} == {len(table[0])}
    saved = picture.with_name("result.json")
    saved.write_text(report.encode(), encoding="utf-8")
    again = picture.with_name("again.svg")
    assert main([name, "--from", str(saved), "--figure", str(again)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(find(name).question)
    assert all(figure in shown for figure in report.figures)
    assert b"<svg" in again.read_bytes()


def test_saliency_of_gaussian_inputs_is_steadier(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run("saliency-inputs", results, tmp_path, capsys).figures
    assert 0 < figures["digits_gaussian_one_error"] < figures["digits_iid_one_error"]
    assert figures["digits_gaussian_for_real_all_iou90"] < 0.8


def test_differences_of_losses_are_close_to_exact_slopes(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("gradient-error", results, tmp_path, capsys)
    assert report.figures["digits_jvp_check_worst"] < 1e-4
    for row in report.rows:
        assert row["relative_error"] == pytest.approx(row["relative_error_jvp"], rel=0.2)
        # K directions of n see about K/n of the gradient.
        if row["k"] == 16:
            assert 0.2 < row["cos2_jvp"] * row["survivors"] / row["k"] < 5


def test_bytes_are_those_of_the_messages(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("wire-bytes", results, tmp_path, capsys)
    for row in report.rows:
        assert row["report"] - 4 * row["k"] == report.rows[0]["report"] - 4 * report.rows[0]["k"]
        assert row["weights"] == 4 * row["survivors"]
        assert row["vectors"] == row["report"] + row["k"] * row["weights"]
        assert row["update"] > 3 * row["k"] * report.settings["devices"]  # three bytes a coefficient


def test_the_scale_of_gaussian_inputs_hardly_matters(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run("input-scale", results, tmp_path, capsys).figures
    assert figures["digits_lenet5_iou90_std10"] > 0.95
    assert figures["digits_lenet5_iou90_std1_mean2"] < 0.6


def test_every_cell_spends_the_queries(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("best-k", results, tmp_path, capsys)
    for row in report.rows:
        spent = row["rounds"] * report.settings["devices"] * (row["k"] + 1)
        assert spent <= report.settings["queries"]
        assert row["sample_forwards"] == pytest.approx(spent * report.settings["batch"])


def test_rules_meet_the_attacks(
    results: dict[str, tuple[Report, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("attacks", results, tmp_path, capsys)
    tried = {(row["run"], row["rule"], row["attack"], row["split"]) for row in report.rows}
    for one in ("stein", "node"):
        for rule in ("mean", "median"):
            assert {(one, rule, attack, "iid") for attack in ("none", "sign flip", "trim attack")} <= tried
    dealt = {(rule, attack, split) for one, rule, attack, split in tried if one == "dealt"}
    assert dealt == {("mean", "none", "iid"), ("mean", "sign flip", "iid")}
    of_stein = {row["sample_forwards"] for row in report.rows if row["run"] == "stein"}
    assert len(of_stein) == 1, "hostile devices do not compute less"


def committed() -> list[Path]:
    return sorted((ROOT / "docs" / "results" / "experiments").glob("*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_results_are_whole(path: Path) -> None:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(data) == KEYS
    assert data["machine"]["cpu"]
    assert data["settings"]["date"]
    assert data["rows"]
    assert data["figures"]
    assert "/" not in json.dumps([data["settings"].get("data"), data["figures"]]), "a data set has a name, no path"
    report = Report.decode(path.read_text(encoding="utf-8"), path.name)
    assert len(find(path.stem).table(report)) > 1
