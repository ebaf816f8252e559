"""``fedzo-device install --systemd``: a unit that runs ``fedzo-device join`` with few rights and a memory limit.

A watchdog restarts a device whose loop hangs. A long forward pass is no reason: it has a thread of its own.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...hardware_profiles.loader import load_profile
from ...protocol.errors import ConfigError
from ...protocol.wire.topics import check_name
from ..connection.endpoint import Endpoint
from ..inference.providers import CPU, provider_names
from ..logs import LogFormat
from ..storage.durable import write_durably
from .device_bundle import BUNDLE_NAMES, DeviceBundle
from .unit_file import HARDENING, UNIT_FOLDER, quoted, unit_path

__all__ = ["UNIT_FOLDER", "UnitSettings", "install", "unit_name", "unit_text"]

# A wrong setting, a budget that is too small, a damaged artifact or a failed self-test do not heal by themselves.
_NO_RESTART: Final = "2 3 4 6 7"

# The loop applies what a device missed in slices, see REQUEST_ENTRIES in protocol/device_side/log_follower.py, which
# may take a minute on a slow board.
WATCHDOG_S: Final = 300
_START_S: Final = 300
_LOGS: Final = Path("/var/log")

CGROUP_EXTRA_MIB: Final = 8
"""A budget is planned as resident memory; a control group also counts page tables, sockets and the page cache."""


@dataclass(frozen=True)
class UnitSettings:
    """What the unit runs; see :class:`~..join.JoinSettings` for the fields of the same name.

    Attributes:
        url: The broker, without a password.
        data: Training data; an absolute path.
        profile: Hardware profile: budget and threads.
        federation: Name of the federation; also part of the unit's name and of the state folder's.
        id: Device id.
        ram_budget_mib: Instead of the profile's; one of both is needed, ``MemoryMax`` follows it.
        username: MQTT user.
        password_file: Read by systemd as root, so that it need not be readable for the service's user.
        ca: Certificates that may sign the broker's.
        cert: The device's certificate.
        key: Its key.
        user: An existing user; by default systemd makes one for the time that the service runs.
        providers: Execution providers in order of preference; empty for the default.
        strict_providers: Refuse a run when the first one does not start.
        credentials: Folder of ``fedzo credentials issue``; read by systemd as root, like the password file.
        log_format: ``text`` or ``json``; on stderr the lines go to the system's journal.
        log_file: Where the log goes instead. systemd makes its folder below ``/var/log``; elsewhere the service needs a
            user who may write there.
        verbose: Log everything, with tracebacks.
        extra: Further options of ``join``.
    """

    url: str
    data: Path
    profile: str = ""
    federation: str = "default"
    id: str | None = None
    ram_budget_mib: float | None = None
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    providers: tuple[str, ...] = ()
    strict_providers: bool = False
    credentials: Path | None = None
    log_format: LogFormat = "text"
    log_file: Path | None = None
    verbose: bool = False
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        endpoint = Endpoint.parse(self.url)
        check_name("federation", self.federation)
        if self.id is not None:
            check_name("device id", self.id)
        if endpoint.password is not None:
            raise ConfigError(
                "the URL holds a password, and everybody can read a unit", hint="put it into a --password-file"
            )
        if self.credentials is not None:
            _check_bundle(self)
        if not self.profile and self.ram_budget_mib is None:
            raise ConfigError(
                "the unit limits the memory, so it needs a budget", hint="give --profile NAME or --ram-budget-mib MIB"
            )
        if self.ram_budget_mib is not None and not 1 <= self.ram_budget_mib < 1e9:
            raise ConfigError(f"ram_budget_mib is {self.ram_budget_mib}, it must be at least 1 and below 1e9")
        if self.providers:
            provider_names(self.providers)
        if self.log_file is not None and not (self.user or _LOGS in _log_folder(self.log_file).parents):
            raise ConfigError(
                f"the service's user may not write to {_log_folder(self.log_file)}",
                hint=f"put the log file into a folder below {_LOGS}, such as {_LOGS}/fedzo, or name a --user",
            )
        if self.user and not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", self.user):
            raise ConfigError(f"{self.user[:60]!r} is no user name")

    @property
    def memory_max_mib(self) -> int:
        """Limit of the control group: the budget and what is charged beside the resident set."""
        return math.ceil(self.ram_budget_mib or load_profile(self.profile).ram_budget_mib) + CGROUP_EXTRA_MIB


def _check_bundle(settings: UnitSettings) -> None:
    assert settings.credentials is not None
    if settings.username or settings.password_file or settings.ca or settings.cert or settings.key:
        raise ConfigError("the credentials folder holds user, password and certificates", hint="name the folder only")
    bundle = DeviceBundle.load(settings.credentials)
    if settings.federation != bundle.federation:
        raise ConfigError(
            f"the credentials are for the federation {bundle.federation}, not for {settings.federation}",
            hint=f"give --federation {bundle.federation}",
        )


def unit_name(settings: UnitSettings) -> str:
    """``fedzo-device.service``, with the federation in it if that is not the default one."""
    return "fedzo-device.service" if settings.federation == "default" else f"fedzo-device-{settings.federation}.service"


def unit_text(settings: UnitSettings, *, python: str = sys.executable) -> str:
    """The unit.

    Raises:
        ConfigError: There is no such profile, or a value holds a control character.
    """
    state = f"fedzo/{settings.federation}"
    user = f"User={settings.user}" if settings.user else "DynamicUser=yes"
    lines = [
        "[Unit]",
        f"Description=fedzo device of the federation {settings.federation}",
        "Wants=network-online.target",
        "After=network-online.target time-sync.target",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(_command(settings, python, state))}",
        user,
        f"StateDirectory={state}",
        "StateDirectoryMode=0700",
        "Environment=MALLOC_ARENA_MAX=1 OPENBLAS_NUM_THREADS=1 ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1",
        f"# The budget, and {CGROUP_EXTRA_MIB} MiB for what is charged beside it, as page tables and sockets.",
        f"MemoryMax={settings.memory_max_mib}M",
        "TasksMax=64",
        "Nice=10",
        "Restart=on-failure",
        "RestartSec=30",
        f"RestartPreventExitStatus={_NO_RESTART}",
        f"WatchdogSec={WATCHDOG_S}",
        f"TimeoutStartSec={_START_S}",
        "TimeoutStopSec=30",
    ]
    # The driver of an accelerator is a device file.
    only_cpu = not settings.providers or provider_names(settings.providers) == (CPU,)
    lines.append(f"PrivateDevices={'yes' if only_cpu else 'no'}")
    if settings.log_file is not None:
        lines += _log_lines(_log_folder(settings.log_file))
    if settings.password_file is not None:
        lines.append(f"LoadCredential=password:{unit_path(settings.password_file).replace('%', '%%')}")
    if settings.key is not None:
        lines.append(f"LoadCredential=key:{unit_path(settings.key).replace('%', '%%')}")
    if (bundle := settings.credentials) is not None:
        lines += [f"LoadCredential={name}:{unit_path(bundle / name).replace('%', '%%')}" for name in BUNDLE_NAMES]
    return "\n".join([*lines, HARDENING, "", "[Install]", "WantedBy=multi-user.target", ""])


def _command(settings: UnitSettings, python: str, state: str) -> list[str]:
    words = [python, "-m", "fedzo.edge_runtime", "join", settings.url, "--data", unit_path(settings.data)]
    for option, value in (
        ("--profile", unit_path(Path(settings.profile)) if settings.profile.endswith(".toml") else settings.profile),
        ("--ram-budget-mib", settings.ram_budget_mib and f"{settings.ram_budget_mib:g}"),
        ("--federation", settings.federation),
        ("--id", settings.id),
        ("--username", settings.username),
        ("--ca", settings.ca and unit_path(settings.ca)),
        ("--cert", settings.cert and unit_path(settings.cert)),
        ("--provider", ",".join(settings.providers)),
        ("--log-format", settings.log_format if settings.log_format != "text" else ""),
        ("--log-file", settings.log_file and unit_path(settings.log_file)),
    ):
        if value:
            words += [option, value]
    words += ["--strict-providers"] if settings.strict_providers else []
    words += ["--verbose"] if settings.verbose else []
    command = [quoted(word) for word in (*words, *settings.extra)]
    command += ["--state", f"/var/lib/{state}"]
    if settings.password_file is not None:
        command += ["--password-file", "${CREDENTIALS_DIRECTORY}/password"]
    if settings.key is not None:
        command += ["--key", "${CREDENTIALS_DIRECTORY}/key"]
    if settings.credentials is not None:
        command += ["--credentials", "${CREDENTIALS_DIRECTORY}"]
    return command


def _log_folder(file: Path) -> Path:
    return Path(os.path.normpath(unit_path(file))).parent


def _own_logs(settings: UnitSettings) -> Path | None:
    """The folder of the log file, if systemd does not make it."""
    folder = None if settings.log_file is None else _log_folder(settings.log_file)
    return None if folder is None or _LOGS in folder.parents else folder


def _log_lines(folder: Path) -> list[str]:
    """What lets the service write there; systemd makes what lies below its folder of logs."""
    if not re.fullmatch(r"[A-Za-z0-9_@:,./+-]+", str(folder)):
        raise ConfigError(f"the folder of logs {folder} holds a space or another character that a unit cannot")
    if _LOGS in folder.parents:
        return [f"LogsDirectory={folder.relative_to(_LOGS)}", "LogsDirectoryMode=0700"]
    return [f"ReadWritePaths={folder}"]


def install(settings: UnitSettings, *, folder: Path = UNIT_FOLDER, overwrite: bool = False) -> tuple[Path, list[str]]:
    """Write the unit and let systemd read it; it is neither enabled nor started.

    Args:
        settings: What it runs.
        folder: Where units lie.
        overwrite: Replace a unit that says something else.

    Returns:
        The file, and what to look at before it is started.

    Raises:
        ConfigError: It cannot be written, a file that it names is not there, or another unit is in its place.
    """
    for role, path in (("data", settings.data), ("password file", settings.password_file), ("CA", settings.ca),
                       ("certificate", settings.cert), ("key", settings.key),
                       ("credentials folder", settings.credentials),
                       ("folder of logs", _own_logs(settings))):  # fmt: skip
        if path is not None and not path.expanduser().exists():
            raise ConfigError(f"the {role} {path} does not exist", hint="the service would fail at its first start")
    text, path = unit_text(settings), folder / unit_name(settings)
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text and not overwrite:
            raise ConfigError(f"{path} exists and says something else", hint="replace it with --overwrite")
        write_durably(path, text.encode())
        path.chmod(0o644)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}", hint="use sudo, or --dry-run to print the unit"
        ) from error
    notes = _notes(settings)
    systemctl = shutil.which("systemctl")
    if systemctl is None or subprocess.run([systemctl, "daemon-reload"], capture_output=True, check=False).returncode:
        notes.append("systemd did not read it: systemctl daemon-reload")
    return path, notes


def _notes(settings: UnitSettings) -> list[str]:
    homes: Sequence[Path] = (Path("/home"), Path("/root"))
    inside = [
        path
        for path in (Path(sys.executable), settings.data.absolute())
        if not settings.user and any(home in path.parents for home in homes)
    ]
    return [f"{path} lies in a home folder: the service's user must be able to read it" for path in inside]
