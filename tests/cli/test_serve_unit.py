"""`fedzo serve --systemd`: the unit runs the same command, goes on after a restart, and systemd understands it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fedzo.cli.main import main
from fedzo.cli.serve_settings import ServeSettings
from fedzo.cli.serve_unit import server_unit, server_unit_name
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.server_side.rate_finder import range_test_settings
from tests.edge_runtime.conftest import write_artifact

SETTINGS = ServeSettings(artifact=Path("artifact"), run="r1")
ARGUMENTS = ("serve", "artifact", "--run", "r1", "--systemd")


def unit(
    settings: ServeSettings = SETTINGS,
    arguments: tuple[str, ...] = ARGUMENTS,
    environment: dict[str, str] | None = None,
    *,
    has_runs: bool = False,
    user: str = "",
) -> str:
    return server_unit(
        settings,
        arguments,
        environment or {},
        folder=Path("/srv/fl"),
        has_runs=has_runs,
        user=user,
        python="/opt/python",
    )


def values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def command(text: str) -> list[str]:
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(values(text)["ExecStart"])]


def test_the_unit() -> None:
    found = values(unit())
    assert found["DynamicUser"] == found["NoNewPrivileges"] == "yes"
    assert (found["Type"], found["WatchdogSec"], found["KillMode"]) == ("notify", "300", "mixed")
    assert (found["StateDirectory"], found["ProtectSystem"]) == ("fedzo-server/default", "strict")
    assert (found["Restart"], found["RestartPreventExitStatus"]) == ("on-failure", "2 3 4 6 7")
    assert found["MemoryMax"] == "1024M"
    assert found["WorkingDirectory"] == "/srv/fl"
    assert command(unit()) == [
        "/opt/python", "-m", "fedzo.cli", "serve", "artifact", "--run", "r1", "--continue",
        "--log-format", "json", "--runs", "/var/lib/fedzo-server/default",
    ]  # fmt: skip


def test_odd_words_and_variables_arrive_as_they_are() -> None:
    odd = 'a b "c" $HOME 100% \\'
    text = unit(arguments=(*ARGUMENTS, "--test-data", odd), environment={"FEDZO_BROKER": odd, "HOME": "/x"})
    assert odd in command(text)
    assert "HOME" not in text.replace("$$HOME", "").replace("$HOME", "")
    (line,) = [line for line in text.splitlines() if "FEDZO_BROKER" in line]
    assert line == 'Environment="FEDZO_BROKER=a b \\"c\\" $HOME 100%% \\\\"'


def test_a_password_is_read_by_systemd() -> None:
    settings = dataclasses.replace(SETTINGS, username="me", password_file=Path("/etc/fl/pass"))
    for given in (("--password-file", "/etc/fl/pass"), ("--password-file=/etc/fl/pass",)):
        text = unit(settings, (*ARGUMENTS, *given))
        assert "LoadCredential=password:/etc/fl/pass" in text
        words = command(text)
        assert words[words.index("--password-file") + 1] == "${CREDENTIALS_DIRECTORY}/password"
        assert words.count("--password-file") == 1
        assert "/etc/fl/pass" not in words


def test_runs_elsewhere_need_a_user_that_lasts() -> None:
    settings = dataclasses.replace(SETTINGS, runs=Path("/data/runs"), log_file=Path("/var/log/fl/log"))
    with pytest.raises(ConfigError, match="cannot use /data/runs"):
        unit(settings, has_runs=True)
    text = unit(settings, (*ARGUMENTS, "--systemd-user", "fl", "--runs", "/data/runs"), has_runs=True, user="fl")
    assert values(text)["User"] == "fl"
    assert "ReadWritePaths=/data/runs\nReadWritePaths=/var/log/fl" in text
    assert "DynamicUser" not in text
    assert "--systemd-user" not in command(text)
    assert command(text).count("--runs") == 1


def test_a_resumed_run_is_resumed_again() -> None:
    settings = dataclasses.replace(SETTINGS, run=None, resume=Path("/data/runs/r1"), artifact=None)
    text = unit(settings, ("serve", "--resume", "/data/runs/r1"), user="fl")
    assert "--continue" not in command(text)
    assert "ReadWritePaths=/data/runs" in text


@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        (ServeSettings(artifact=Path("artifact")), {}, "new run"),
        (SETTINGS, {"FEDZO_PASSWORD": "hunter2"}, "everybody can read a unit"),
        (SETTINGS, {"FEDZO_X": "a\nUser=root"}, "holds a character"),
        (SETTINGS, {"FEDZO_BROKER": "mqtts://me:hunter2@broker"}, "the broker's URL has a password"),
        (dataclasses.replace(SETTINGS, tune_rounds=60), {}, "range test"),
        (range_test_settings(SETTINGS), {}, "range test"),
        (dataclasses.replace(SETTINGS, credentials=Path("/etc/fl")), {}, "cannot use /etc/fl"),
    ],
)
def test_what_makes_no_unit(settings: ServeSettings, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        unit(settings, environment=environment)
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("words", [("--broker", "mqtt://me:hunter2@h"), ("--broker=MQTT://me:hun/ter2@h",)])
def test_no_password_of_a_flag_is_printed(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="has a password") as caught:
        unit(arguments=(*ARGUMENTS, *words))
    assert "--password-file" in caught.value.hint
    assert "mqtt://me@h:1883" in command(unit(arguments=(*ARGUMENTS, "--broker", "mqtt://me@h:1883")))


@pytest.mark.parametrize("json_", [(), ("--json",)])
def test_show_config_hides_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], json_: tuple[str, ...]
) -> None:
    write_artifact(tmp_path / "artifact")
    monkeypatch.setenv("FEDZO_BROKER", "mqtt://me:hunt:e@r2@h")
    assert main(["serve", str(tmp_path / "artifact"), "--sparsity", "0", "--show-config", *json_]) == 0
    out, err = capsys.readouterr()
    assert "mqtt://me:***@h" in out + err
    assert "r2" not in (out + err).replace(str(tmp_path), "")


def test_no_word_adds_a_line() -> None:
    with pytest.raises(ConfigError, match="cannot"):
        unit(arguments=(*ARGUMENTS, "x\nUser=root"))


def test_names() -> None:
    assert server_unit_name(SETTINGS) == "fedzo-server.service"
    assert server_unit_name(dataclasses.replace(SETTINGS, federation="plant-1")) == "fedzo-server-plant-1.service"


def test_the_command_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_artifact(tmp_path / "artifact")
    assert main(["serve", "artifact", "--run", "r1", "--devices", "4", "--systemd", "--sparsity", "0"]) == 0
    out, err = capsys.readouterr()
    assert command(out)[3:8] == ["serve", "artifact", "--run", "r1", "--devices"]
    assert "fedzo-server.service" in err
    assert not (tmp_path / "runs").exists()
    assert main(["serve", "artifact", "--run", "r1", "--systemd", "--json", "--sparsity", "0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["unit"] == "fedzo-server.service"
    assert answer["text"].startswith("[Unit]\n")
    assert main(["serve", "artifact", "--systemd", "--sparsity", "0"]) == 3


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_systemd_understands_it_and_finds_little_exposed(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, username="me", password_file=tmp_path / "pass 100%")
    path = tmp_path / "fedzo-server.service"
    text = server_unit(
        settings, (*ARGUMENTS, "--test-data", 'a "b" 100%'), {"FEDZO_BROKER": "auto"}, folder=tmp_path, has_runs=False,
        user="",
    )  # fmt: skip
    path.write_text(text)
    done = analyze("verify", path)
    assert "fedzo-server" not in done.stderr, done.stderr
    path.write_text(text.replace("WatchdogSec", "WatchDogSec"))
    assert "WatchDogSec" in analyze("verify", path).stderr  # it does look
    path.write_text(text)
    done = analyze("security", "--offline=yes", "--threshold=20", path)
    if "unrecognized option" in done.stderr or "not supported" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a file")  # before systemd 250
    assert done.returncode == 0, done.stdout[-400:] + done.stderr
