"""What commands with many settings say of them: defaults in the help, hints that name one option, warnings."""

from __future__ import annotations

import json
import re

import pytest
import typer

from fedzo.cli.app import app
from fedzo.cli.main import main
from fedzo.cli.run_options import SETTINGS
from fedzo.edge_runtime.config import default_values, unknown_variables
from fedzo.protocol.settings import RunSettings
from fedzo.simulation.settings import SimulationSettings


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("--close-at 2 --devices 4", "close at is 2, it must be 0, or the quorum (4)", "--close-at 4, or --quorum 2"),
        ("--close-at 9", "close at is 9", "--close-at 8"),
        ("--per-round 5 --devices 4", "participants is 5", "--per-round 4 or less, or --devices 5"),
        ("--quorum 9", "quorum is 9", "--quorum 8"),
        ("--k 0 --devices 4 --rounds 3", "k is 0, it must be 1 to 60000", "change --k"),
        ("--sigma 0", "sigma is 0.0", "change --sigma"),
        ("--saliency-samples 0", "saliency samples is 0", "change --saliency-samples"),
        ("--deadline 0", "deadline is 0.0", "change --deadline"),
        ("--hostile -1", "hostile devices is -1", "change --hostile"),
        ("--port -1", "port is -1", "change --port"),
        ("--estimator magic", "--estimator: training.estimator = 'magic' is not one of stein", "--show-config"),
    ],
)
def test_a_refusal_names_the_option_that_it_is_about(
    arguments: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments.split(), "--show-config", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in error["message"]
    assert hint in error["hint"]
    assert "from flag" not in error["hint"]


def test_a_refusal_names_the_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FEDZO_TRAINING_K", "0")
    assert main(["serve", "--show-config", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "change FEDZO_TRAINING_K"


def test_an_option_of_the_simulation_is_called_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--bandwidth", "-1", "--show-config", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "change --bandwidth"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export lenet5 -o x --classes 0", "--classes is '0', it must be 2 or more"),
        ("export lenet5 -o x --sections 99", "--sections is '99', it must be 8 or less"),
        ("export lenet5 -o x --classes many", "--classes is 'many', it must be a whole number"),
        ("inspect x --round -1", "--round is '-1', it must be 1 or more"),
        ("deploy x --kind foo", "--kind: 'foo' is not one of 'logits', 'softmax'"),
        ("serve --sigma x", "--sigma is 'x', it must be a number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert f"error: {message}\n" in capsys.readouterr().err


def test_settings_can_be_seen_without_an_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "simulate"):
        assert main([command, "--k", "7", "--show-config", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["training.k"] == {"value": 7, "origin": "flag"}
        assert main([command]) == 3
        assert "no artifact is named" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_the_help_has_the_defaults(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    words = " ".join(re.sub(r"[│]", " ", capsys.readouterr().out).split())
    run = RunSettings()
    for option, value in {
        "--rounds": run.training.rounds,
        "--k": run.training.k,
        "--devices": run.devices,
        "--deadline": f"{run.deadline_s:g}",
        "--sigma": "0.001",
        "--optimiser": run.training.optimiser.name,
        "--two-sided": "--one-sided",
    }.items():
        assert re.search(rf" {option} [^\[]*\[default: {value}\]", words), option
    if command == "serve":
        assert re.search(r" --port <int> [^\[]*\[default: 1883\]", words)
    else:
        assert re.search(rf" --split <str> [^\[]*\[default: {SimulationSettings().split}\]", words)


def test_every_option_of_a_run_sets_something_that_there_is() -> None:
    assert set(SETTINGS.values()) <= set(default_values(RunSettings))
    command = typer.main.get_command(app)
    parameters = {parameter.name for parameter in command.commands["serve"].params}  # type: ignore[attr-defined]
    assert set(SETTINGS) <= parameters


def test_variables_that_are_no_setting() -> None:
    environ = {
        "FEDZO_TRAINING_ROUNDZ": "3",
        "FEDZO_SALIENCY_METHD": "erk",
        "FEDZO_AGGREGATION_X": "1",
        "FEDZO_TRAINING_OPTIMISER_NAME": "sgd",
        "FEDZO_TRAINING_KK": "",
        "FEDZO_DEBUG": "1",
    }
    aggregation, saliency, training = unknown_variables(RunSettings, environ)
    assert training == "the variable FEDZO_TRAINING_ROUNDZ is no setting: did you mean FEDZO_TRAINING_ROUNDS?"
    assert saliency.endswith("did you mean FEDZO_SALIENCY_METHOD?")
    assert aggregation.startswith("the variable FEDZO_AGGREGATION_X is no setting")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--warmup 600 --rounds 500", "--warmup 600 is not below --rounds 500: the rate never reaches its peak"),
        ("--tail-k 5", "--tail-k has no effect without --estimator split, node, local, local-node"),
        ("--repeats 5 --estimator split", "--repeats has no effect without --estimator node, local-node"),
        ("--decay-every 5", "--decay-every has no effect without --schedule step"),
        ("--clip-factor 2", "--clip-factor has no effect without --clip norm or value"),
        ("--tail-k 5 --estimator split --warmup 5 --rounds 9", ""),
        ("--decay-every 5 --schedule step --clip norm --clip-factor 2", ""),
    ],
)
@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_settings_without_effect(
    command: str, arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDZO_TRAINING_ROUNDZ", "3")
    assert main([command, *arguments.split(), "--show-config"]) == 0
    first, *rest = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "FEDZO_TRAINING_ROUNDS?" in first
    assert rest == ([f"warning: {said}"] if said else [])
