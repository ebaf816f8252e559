"""`fedzo export --keep-channels`, and what `fedzo plan` says of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedzo.cli.main import main
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.storage.artifact import load_artifact

pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_export_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a"
    code, result = run(capsys, "export", "lenet5", "--keep-channels", 0.5, "-o", folder)
    assert (code, result["channels"], result["whole_channels"]) == (0, 123, 236)
    assert (result["parameters"], result["whole_parameters"]) == (15_738, 61_706)
    assert result["work_ratio"] == pytest.approx(0.321, abs=1e-3)
    code, result = run(capsys, "plan", folder, "--profile", "rpi-zero-2w")
    assert code == 0
    assert result["structure"]["layers"]["conv2.weight"] == [8, 16]
    (board,) = result["boards"]
    assert board["ram_saved_mib"] > 0.2
    assert main(["plan", str(folder), "--profile", "rpi-zero-2w"]) == 0
    shown = capsys.readouterr().out
    assert "RAM saved MiB" in shown
    assert "123 of 236 channels (uniform), 15738 of 61706 parameters" in shown


def test_a_dense_artifact_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "export", "lenet5", "-o", tmp_path / "a")
    assert code == 0
    assert "channels" not in result
    _, result = run(capsys, "plan", tmp_path / "a", "--profile", "rpi-zero-2w")
    assert "structure" not in result
    assert "ram_saved_mib" not in result["boards"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-channels", "0"), "it must be above 0 and at most 1"),
        (("--keep-channels", "1.5"), "it must be above 0 and at most 1"),
        (("--keep-channels", "nan"), "it must be above 0 and at most 1"),
        (("--keep-channels", "0.01"), "of the 6 channels of conv1.weight none would stay"),
        (("--keep-channels", "0.5", "--channel-scores", "best"), "channels cannot be ranked by 'best'"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "export", "lenet5", "-o", tmp_path / "a", *options)
    assert code == 3
    assert message in result["error"]["message"]
    assert not (tmp_path / "a").exists()


def test_scores_without_a_fraction_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "lenet5", "--channel-scores", "diagonal", "-o", str(tmp_path / "a")]) == 3
    assert "--keep-channels" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_scoring_passes_are_those_of_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "lenet5", "-o", str(tmp_path / "a")]) == 0
    manifest = load_artifact(tmp_path / "a").manifest
    assert f"scoring passes\t{UnitShiftScorer(manifest).passes}\n" in capsys.readouterr().out


def test_an_export_says_what_is_never_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "lenet5", "-o", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert "prunable\t61470 of 61706; the others are never pruned" in shown.out
    assert "warning" not in shown.err
    own = ["tests.exporter.user_models:recurrent", "--input", "4x5", "--classes", "3"]
    assert main(["export", *own, "-o", str(tmp_path / "b"), "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    prunable, parameters = answer["prunable"], answer["parameters"]
    assert 0 < prunable < parameters / 2
    removed = round(0.8 * prunable)
    assert f"only {prunable} of {parameters} parameters can be pruned: a sparsity of 0.8 removes {removed}" in shown.err
