"""`fedzo plan` and `fedzo profile`: boards that fit, boards that do not, and the plan against a real process."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedzo.cli.main import main
from fedzo.edge_runtime.inference.ort import arena_limit_holds, runtime_version
from fedzo.edge_runtime.inference.variants import wanted_variants
from fedzo.edge_runtime.planning import run_plan
from fedzo.edge_runtime.planning.board_plan import RunSizes, plan_board
from fedzo.edge_runtime.planning.child import answer_of
from fedzo.edge_runtime.planning.memory import SCORING_GRAPHS, TRAINING_GRAPHS, plan
from fedzo.edge_runtime.planning.run_plan import Limits, plan_run
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.hardware_profiles import list_profiles, load_profile
from fedzo.protocol.artifact.manifest import GraphMemory
from fedzo.protocol.errors import ConfigError, FedzoError, MemoryBudgetError, SelfTestError
from fedzo.protocol.settings import RunSettings, TrainingSettings

PARTS = ("process_mib", "code_mib", "session_mib", "feeds_mib", "live_mib", "margin_mib", "kept_mib")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exporter = pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")
    folder = tmp_path_factory.mktemp("plan") / "lenet5"
    exporter.export_artifact("lenet5", (1, 32, 32), 10, 0.8, 1, folder)
    return folder


@pytest.fixture(scope="module")
def local_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exporter = pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")
    folder = tmp_path_factory.mktemp("local") / "lenet5"
    exporter.export_artifact("lenet5", (1, 32, 32), 10, 0.8, 1, folder, local_heads=True)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, arguments), "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, result


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_board_plan_is_what_a_device_plans(artifact: Path) -> None:
    manifest, settings = load_artifact(artifact).manifest, RunSettings()
    layout = manifest.layout
    survivors = layout.size - round(0.8 * layout.maskable_size)
    board = plan_board(manifest, 160.0, RunSizes(threads=4))
    scoring, training = board.phases
    assert training.memory == plan(
        manifest, survivors, 160.0, graphs=TRAINING_GRAPHS, batch=settings.training.batch, threads=4
    )
    assert scoring.memory == plan(
        manifest,
        layout.size,
        160.0,
        graphs=SCORING_GRAPHS,
        batch=settings.saliency.samples,
        threads=4,
        n_following=survivors,
    )
    assert board.fits
    assert board.peak.slack_mib == 160.0 - max(p.memory.planned_peak_mib for p in board.phases)
    assert [p.phase for p in plan_board(manifest, 160.0, RunSizes(sparsity=0.0)).phases] == ["training"]


def test_fill_and_pruning_are_those_of_the_run(artifact: Path) -> None:
    """With its own initial values in them the graphs read the whole layout; a mask of the server is not scored for."""
    manifest = load_artifact(artifact).manifest
    usual, filled = (plan_board(manifest, 160.0, RunSizes(fill=fill)).phases for fill in ("zero", "init"))
    layout, settings = manifest.layout, RunSettings(fill="init")
    survivors = layout.size - round(0.8 * layout.maskable_size)
    assert filled[1].memory == plan(
        manifest, survivors, 160.0, graphs=TRAINING_GRAPHS, batch=settings.training.batch, n_fed=layout.size
    )
    more = filled[1].memory.planned_peak_mib - usual[1].memory.planned_peak_mib
    assert more > 0
    method: Any
    for method in ("diagonal", "ntk-sap"):
        assert plan_board(manifest, 160.0, RunSizes(pruning=method)).phases == usual
    for method in ("synflow", "magnitude", "erk", "random"):
        assert plan_board(manifest, 160.0, RunSizes(pruning=method)).phases == usual[1:]


def test_fill_and_pruning_by_flag(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--profile", "rpi-zero-2w", "--pruning", "erk")
    peaks = []
    for fill in ("zero", "init"):
        code, found = answer(capsys, "plan", artifact, *flags, "--fill", fill)
        assert code == 0
        (board,) = found["boards"]
        assert list(board["phases"]) == ["training"]
        peaks.append(board["planned_peak_mib"])
    assert peaks[0] < peaks[1]


def test_what_does_not_fit_says_how_much_it_needs(artifact: Path) -> None:
    manifest = load_artifact(artifact).manifest
    board = plan_board(manifest, 40.0, RunSizes())
    assert not board.fits
    for phase in board.phases:
        assert phase.memory.planned_peak_mib > 45
        assert phase.slack_mib == pytest.approx(40.0 - phase.memory.planned_peak_mib)
        assert "the budget is 40 MiB" in phase.refusal
    scoring, training = board.phases
    assert "fewer samples than 64" in scoring.hint
    assert "--batch" in training.hint
    with pytest.raises(MemoryBudgetError, match="scoring: lenet5 needs"):
        board.check()
    larger = tuple(GraphMemory(m.name, tuple((f, 9 * each) for f, each in m.envelope)) for m in manifest.memory)
    manifest = dataclasses.replace(manifest, memory=larger)
    full = plan_board(manifest, 160.0, RunSizes(micro_batch=32)).phases[0].memory.planned_peak_mib
    assert plan_board(manifest, full - 0.05, RunSizes(micro_batch=32)).phases[0].hint == "--micro-batch 16 fits"


def test_all_boards(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(artifact)]) == 0
    heading, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [board.name for board in list_profiles()]
    assert {row[heading.index("fits")] for row in rows} == {"yes"}
    assert all(float(row[heading.index("query ms")]) > 0 for row in rows)
    code, small = answer(capsys, "plan", artifact, "--profile", "all", "--budget-mib", 40)
    assert code == 0  # only a board that was named makes it fail
    assert len(small["boards"]) == len(rows)
    assert not any(board["fits"] for board in small["boards"])


def test_one_board(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, fits = answer(capsys, "plan", artifact, "--profile", "rpi-zero-2w", "--batch", 64)
    assert code == 0
    (board,) = fits["boards"]
    assert board["budget_mib"] == load_profile("rpi-zero-2w").ram_budget_mib
    for phase in board["phases"].values():
        assert sum(phase[part] for part in PARTS) == pytest.approx(phase["planned_peak_mib"])
        assert phase["kept_mib"] == 0
    assert board["phases"]["training"]["micro_batch"] == 32
    assert 1e-4 < board["predicted_query_s"] < 10
    code, refused = answer(capsys, "plan", artifact, "--profile", "rpi-zero-2w", "--budget-mib", 40)
    assert code == 4
    assert refused["boards"][0]["fits"] is False


@pytest.mark.parametrize("estimator", ["node", "split"])
def test_the_graphs_of_an_estimator_are_planned_as_a_device_does(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, estimator: Any
) -> None:
    manifest = load_artifact(artifact).manifest
    monkeypatch.setattr(run_plan, "tls_bytes", lambda: 0)  # a device without TLS; the test's process may have loaded it
    settings = RunSettings(sparsity=0.8, training=TrainingSettings(estimator=estimator))

    class Streamed:
        resident_bytes = 0

    limits = Limits(load_profile("rpi-5-8gb").ram_budget_mib, threads=load_profile("rpi-5-8gb").threads)
    device = plan_run(manifest, settings, Streamed(), limits, None)[0][0]  # type: ignore[arg-type]
    assert device.keeps_graphs
    sizes = RunSizes(threads=limits.threads, estimator=estimator, variants=wanted_variants(manifest))
    assert plan_board(manifest, limits.ram_budget_mib, sizes).phases[-1].memory == device
    options = ["plan", str(artifact), "--profile", "rpi-5-8gb", "--estimator", estimator]
    budget_mib = 400.0
    for words in ("stay loaded", "one at a time"):
        code, found = answer(capsys, *options, "--budget-mib", budget_mib)
        phase = found["boards"][0]["phases"]["training"]
        assert code == 0
        assert (phase["kept_mib"] > 0) is (words == "stay loaded")
        assert sum(phase[part] for part in PARTS) == pytest.approx(phase["planned_peak_mib"])
        assert main([*options, "--budget-mib", str(budget_mib)]) == 0
        heading, row = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert row[heading.index("graphs")] == words
        budget_mib = phase["planned_peak_mib"] - 0.01


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--estimator", "none"], 3),
        (["--estimator", "local"], 3),
        (["--profile", "rpi-9"], 3),
        (["--sparsity", "1"], 3),
        (["--fill", "ones"], 3),
        (["--fill", "init", "--sparsity", "0"], 3),
        (["--pruning", "none"], 3),
        (["--batch", "0"], 2),
        (["--budget-mib", "0"], 2),
    ],
)
def test_wrong_options(artifact: Path, arguments: list[str], code: int) -> None:
    assert main(["plan", str(artifact), *arguments]) == code


def test_no_artifact(tmp_path: Path) -> None:
    assert main(["plan", str(tmp_path / "none")]) == 6


def test_no_engine_is_loaded(artifact: Path) -> None:
    script = (
        "import sys\nfrom fedzo.cli.main import main\n"
        f"main(['plan', {str(artifact)!r}, '--json'])\n"
        "print(sorted({'onnxruntime', 'onnx', 'torch', 'paho'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


# --- the measurement ------------------------------------------------------------------------------------------------


@needs_proc
def test_planned_against_measured(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(
        capsys, "profile", artifact, "--profile", "rpi-zero-2w", "--batch", 32, "--saliency-samples", 32
    )
    assert code == 0
    assert found["profile"] == "rpi-zero-2w"
    assert [phase["phase"] for phase in found["phases"]] == ["scoring", "training"]
    for phase in found["phases"]:
        # Like with like: how much of the libraries' code is resident, the kernel's page cache decides. The process was
        # measured with onnxruntime 1.32.0; older releases need less.
        over = phase["planned_anonymous_mib"] - phase["anonymous_mib"]
        newest = tuple(int(part) for part in runtime_version().split(".")[:2]) >= (1, 32)
        assert -1.0 < over < (0.05 * phase["anonymous_mib"] + 1.0 if newest else 15.0)
        assert phase["anonymous_mib"] < phase["measured_mib"] < phase["anonymous_mib"] + phase["code_mib"] + 4.0
        if arena_limit_holds():
            assert 0.2 * phase["planned_tensors_mib"] < phase["tensors_mib"] <= phase["planned_tensors_mib"]
    assert found["floor_mib"] < found["peak_mib"] <= 160
    assert found["predicted_query_s"] > 0
    assert found["phases"][0]["query_s"] is None
    assert found["phases"][1]["query_s"] > 0
    if importlib.util.find_spec("torch") is not None:
        assert found["torch"]["peak_mib"] > found["torch"]["before_mib"]
        assert found["torch_over_ours"] == pytest.approx(found["torch"]["peak_mib"] / found["peak_mib"])


@needs_proc
def test_initial_values_in_removed_places_are_measured(artifact: Path) -> None:
    arguments = [str(artifact), "--budget-mib", "160", "--fill", "init", "--pruning", "erk"]
    found = answer_of("fedzo.edge_runtime.planning.measure", arguments)
    (training,) = found["phases"]
    assert training["phase"] == "training"
    assert training["anonymous_mib"] < training["planned_anonymous_mib"] + 1.0


@needs_proc
@pytest.mark.parametrize(
    ("estimator", "budget_mib", "keeps_graphs"),
    [("split", 160, True), ("node", 160, True), ("node", 58.5, False), ("coordinate", 160, True)],
)
def test_every_estimator_is_measured(artifact: Path, estimator: str, budget_mib: float, keeps_graphs: bool) -> None:
    arguments = [str(artifact), "--budget-mib", str(budget_mib), "--estimator", estimator, "--pruning", "erk"]
    _holds(answer_of("fedzo.edge_runtime.planning.measure", arguments), keeps_graphs)


@needs_proc
@pytest.mark.parametrize(("estimator", "budget_mib"), [("local", 160), ("local", 56), ("local-node", 160)])
def test_local_estimators_are_measured(local_artifact: Path, estimator: str, budget_mib: float) -> None:
    arguments = [str(local_artifact), "--budget-mib", str(budget_mib), "--pruning", "erk"]
    arguments += [] if estimator == "local" else ["--estimator", estimator]  # what an artifact with heads has
    _holds(answer_of("fedzo.edge_runtime.planning.measure", arguments), budget_mib == 160)


def test_an_artifact_with_local_heads_is_planned_for_their_estimator(
    local_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        answer(capsys, "plan", local_artifact, "--profile", "rpi-zero-2w", *more)
        for more in ([], ["--estimator", "local"])
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0
    for command in ("plan", "profile"):
        code, refused = answer(capsys, command, local_artifact, "--profile", "rpi-zero-2w", "--estimator", "node")
        assert code == 3
        assert "has local heads, the estimator node does not train them" in refused["error"]["message"]


def _holds(found: dict[str, Any], keeps_graphs: bool) -> None:
    """A plan with graphs that stay counts every tensor of each of them, and may be well above."""
    (training,) = found["phases"]
    assert training["keeps_graphs"] is keeps_graphs
    over = training["planned_anonymous_mib"] - training["anonymous_mib"]
    assert -1.0 < over < (18.0 if keeps_graphs else 0.05 * training["anonymous_mib"] + 3.0)


def test_a_budget_that_is_too_small_runs_nothing(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, refused = answer(capsys, "profile", artifact, "--profile", "rpi-zero-2w", "--budget-mib", 40)
    assert code == 4
    assert "the budget is 40 MiB" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("peaks._watch = fails", 3, "nothing can be measured here"),  # a system without /proc
        ("phases.threshold = fails", SelfTestError.exit_code, "makes the mask ended with status"),
    ],
)
@needs_proc
def test_a_measurement_that_cannot_be_made(artifact: Path, script: str, code: int, message: str) -> None:
    text = (
        "import sys\nfrom fedzo.edge_runtime.planning import measure, peaks, phases\n"
        "def fails(*_): raise FileNotFoundError('/proc')\n"
        f"{script}\nsys.exit(measure.main())"
    )
    command = [sys.executable, "-c", text, str(artifact), "--budget-mib", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert message in json.loads(done.stdout)["error"]["message"]
    assert done.returncode == code


def test_a_child_says_what_went_wrong(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryBudgetError, match="the budget is 40 MiB"):
        answer_of("fedzo.edge_runtime.planning.measure", [str(artifact), "--budget-mib", "40"])
    with pytest.raises(ConfigError, match="estimator is 'nod'"):
        answer_of("fedzo.edge_runtime.planning.measure", [str(artifact), "--budget-mib", "160", "--estimator", "nod"])
    with pytest.raises(FedzoError, match=r"No module named fedzo\.nothing"):
        answer_of("fedzo.nothing", [])
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FedzoError, match="dies died with signal SIGKILL"):
        answer_of("dies", [])
    with pytest.raises(FedzoError, match=r"hangs took more than 0\.5 s"):
        answer_of("hangs", [], timeout_s=0.5)
