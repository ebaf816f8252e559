"""`fedzo serve ... --systemd`: a unit that runs the very same command with few rights, and goes on after a restart."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ..edge_runtime.installation.unit_file import HARDENING, quoted, unit_path
from ..protocol.errors import ConfigError
from .broker_url import has_password
from .output import Output
from .serve_settings import ServeSettings

__all__ = ["print_unit", "server_unit", "server_unit_name"]

MEMORY_MAX_MIB: Final = 1024
"""Of server and broker together; docs/operations.md says what they need."""
WATCHDOG_S: Final = 300
_FLAGS: Final = ("--systemd", "--json")
_PASSWORD: Final = "FEDZO_PASSWORD"  # noqa: S105 (the name of a variable)
# Wrong settings, memory and damaged files do not heal by themselves; a missing quorum (8) and a broker (5) may.
_NO_RESTART: Final = "2 3 4 6 7"


def server_unit_name(settings: ServeSettings) -> str:
    """``fedzo-server.service``, with the federation in it if that is not the default one."""
    extra = "" if settings.federation == "default" else f"-{settings.federation}"
    return f"fedzo-server{extra}.service"


def server_unit(
    settings: ServeSettings,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: Path,
    has_runs: bool,
    user: str,
    python: str = sys.executable,
) -> str:
    """The unit's text.

    Args:
        settings: What the command line means.
        arguments: The command line itself, without the program.
        environment: Its ``FEDZO_...`` variables go into the unit.
        folder: Where the command was given: its relative paths hold there.
        has_runs: Somebody chose where the run folders lie.
        user: An existing user; empty for one that systemd makes while the service runs.
        python: The interpreter.

    Raises:
        ConfigError: The unit could not start, start again, or keep a secret.
    """
    if settings.run is None and settings.resume is None:
        raise ConfigError("every start would be a new run", hint="give --run NAME, or --resume RUN")
    if environment.get(_PASSWORD):
        raise ConfigError(f"everybody can read a unit, and {_PASSWORD} is set", hint="put it into a --password-file")
    given = (*arguments, *(value for name, value in environment.items() if _is_setting(name)))
    if any(has_password(text) for text in given):
        raise ConfigError(
            "everybody can read a unit, and the broker's URL has a password",
            hint="give --username and a --password-file",
        )
    if settings.tune_rounds or settings.training.schedule == "range":
        raise ConfigError(
            "a unit starts one run again and again, and a range test is followed by another",
            hint="find the rate without --systemd, then make a unit for the run: --resume RUN",
        )
    outside = _outside(settings, has_runs=has_runs)
    if outside and not user:
        raise ConfigError(
            f"a user that systemd makes cannot use {outside[0]}", hint="name an existing one with --systemd-user NAME"
        )
    state = f"fedzo-server/{settings.federation}"
    command = [quoted(python), "-m", "fedzo.cli", *_command(settings, arguments)]
    if settings.resume is None and not has_runs:
        command += ["--runs", f"/var/lib/{state}"]
    lines = [
        "[Unit]",
        f"Description=fedzo server of the federation {settings.federation}",
        "Wants=network-online.target",
        "After=network-online.target time-sync.target mosquitto.service",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"WorkingDirectory={unit_path(folder).replace('%', '%%')}",
        f"ExecStart={' '.join(command)}",
        f"User={user}" if user else "DynamicUser=yes",
        f"StateDirectory={state}",
        "StateDirectoryMode=0700",
        "Environment=OPENBLAS_NUM_THREADS=1 ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1",
        *(f"Environment={_assignment(name, environment[name])}" for name in sorted(environment) if _is_setting(name)),
        f"MemoryMax={MEMORY_MAX_MIB}M",
        "TasksMax=256",
        "LimitNOFILE=65536",
        "# The first signal is for the server alone, which stops its broker last.",
        "KillMode=mixed",
        "TimeoutStopSec=60",
        "Restart=on-failure",
        "RestartSec=10",
        f"RestartPreventExitStatus={_NO_RESTART}",
        f"WatchdogSec={WATCHDOG_S}",
        "TimeoutStartSec=300",
        "PrivateDevices=yes",
        *(f"ReadWritePaths={unit_path(path).replace('%', '%%')}" for path in outside),
    ]
    if settings.password_file is not None:
        lines.append(f"LoadCredential=password:{unit_path(settings.password_file).replace('%', '%%')}")
    return "\n".join([*lines, HARDENING, "", "[Install]", "WantedBy=multi-user.target", ""])


def print_unit(output: Output, settings: ServeSettings, user: str, *, has_runs: bool) -> None:
    """Print the unit of the command line that is being carried out, and say what to look at.

    Raises:
        ConfigError: See :func:`server_unit`.
    """
    text = server_unit(settings, output.arguments, os.environ, folder=Path.cwd(), has_runs=has_runs, user=user)
    for note in _warnings(settings, Path.cwd()):
        output.warn(note)
    name = server_unit_name(settings)
    output.say(f"write it to /etc/systemd/system/{name}, then: systemctl daemon-reload, systemctl enable --now {name}")
    if not output.json:
        output.text(text.rstrip("\n"))
    output.result({"unit": name, "text": text})


def _warnings(settings: ServeSettings, folder: Path) -> list[str]:
    """What to look at before the unit is started."""
    notes = []
    places = [folder.absolute(), Path(sys.executable)]
    places += [path.absolute() for path in (settings.artifact, settings.test_data) if path is not None]
    for path in places:
        if Path("/tmp") in path.parents or Path("/var/tmp") in path.parents:  # noqa: S108 (it is compared, not used)
            notes.append(f"{path} lies in a folder of temporary files, and the service has one of its own")
        elif any(home in path.parents for home in (Path("/home"), Path("/root"))):
            notes.append(f"{path} lies in a home folder: the service's user must be able to read it")
    return notes


def _outside(settings: ServeSettings, *, has_runs: bool) -> list[Path]:
    """Where the server writes beside its state folder, and what only its owner can read."""
    found = [settings.resume.parent] if settings.resume is not None else [settings.runs] if has_runs else []
    found += [settings.log_file.parent] if settings.log_file is not None else []
    return found + ([settings.credentials] if settings.credentials is not None else [])


def _command(settings: ServeSettings, arguments: Sequence[str]) -> list[str]:
    """The same command line, in the unit's words; a password comes from systemd, which reads it as root."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, has_value, _ = word.partition("=")
        if name in ("--systemd-user", "--password-file"):
            if not has_value:
                next(rest, None)
        elif word not in _FLAGS:
            words.append(quoted(word))
    if settings.password_file is not None:
        words += ["--password-file", "${CREDENTIALS_DIRECTORY}/password"]
    if settings.resume is None and not settings.continue_run:
        words.append("--continue")
    if settings.log_format == "text" and settings.log_file is None:
        words += ["--log-format", "json"]  # for the system's journal
    return words


def _is_setting(name: str) -> bool:
    return name.startswith("FEDZO_") and name not in (_PASSWORD, "FEDZO_DEBUG", "FEDZO_LOG_FORMAT")


def _assignment(name: str, value: str) -> str:
    """One variable, see systemd.exec(5): quotes and percent signs mean something, dollars do not."""
    text = f"{name}={value}"
    if not text.isprintable():
        raise ConfigError(f"the variable {name} holds a character that a unit cannot")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
