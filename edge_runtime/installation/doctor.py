"""``fedzo-device doctor``: whether this machine could take part in a run, one line a check.

A check ends as ``ok``, ``warn`` (a run may still work) or ``FAIL`` (it cannot). ONNX Runtime is only loaded by a child
process, which a broken wheel may kill.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ...hardware_profiles.loader import Profile, load_profile
from ...protocol.errors import ConfigError, FedzoError, SelfTestError
from ...protocol.wire.topics import check_name
from ..connection.broker_check import BrokerAccess, broker_findings, describe
from ..inference.providers import CPU, provider_names
from ..planning.board_plan import RunSizes, plan_board
from ..planning.memory import PROCESS_FLOOR_MIB, available_mib, total_mib
from ..storage.artifact import Artifact, load_artifact
from ..storage.state import default_folder
from .device_bundle import DeviceBundle
from .selftest import KNOWN_ANSWERS, keeps_denormals
from .versions import installed_versions
from .wheels import known_bad, this_processor

__all__ = ["Check", "DoctorSettings", "Status", "diagnose", "verdict"]

Status = Literal["ok", "warn", "fail"]

BUILT: Final = dt.datetime(2026, 11, 1, tzinfo=dt.timezone.utc)
"""This release is not older; a clock that is behind was never set."""
CHILD_TIMEOUT_S: Final = 180.0
_LITTLE_DISK_MIB: Final = 64
_STAGES: Final = {
    "import": "importing it",
    "forward": "a small network",
    "providers": "the execution provider",
    "golden loss": "the artifact's golden loss",
    "golden predictions": "the artifact's golden predictions",
}
_OTHER_RELEASE: Final = "install another release of onnxruntime, see docs/boards.md"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was checked.
        status: How it ended.
        detail: What was found.
        hint: The next action; may be empty.
    """

    name: str
    status: Status
    detail: str
    hint: str = ""

    def __str__(self) -> str:
        mark = "FAIL" if self.status == "fail" else self.status
        return f"{mark:4} {self.name}: {self.detail}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class DoctorSettings:
    """What to check beside the machine itself; see :class:`~..join.JoinSettings` for the fields of the connection.

    Attributes:
        artifact: Folder of `fedzo export`, for its known answer and its memory.
        profile: Hardware profile that the machine should have.
        providers: Execution providers in order of preference.
        strict_providers: Fail when the first one does not start.
        url: Broker; empty to check none.
        federation: Name of the federation.
        id: Device id; by default the one in the state folder.
        state: State folder.
        username: MQTT user.
        password_file: Its first line is the password.
        ca: Certificates that may sign the broker's.
        cert: The device's certificate.
        key: Its key.
        connect_timeout: Seconds for the connection.
        credentials: Folder of ``fedzo credentials issue``, instead of federation, id, password and files.
    """

    artifact: Path | None = None
    profile: str = ""
    providers: tuple[str, ...] = (CPU,)
    strict_providers: bool = False
    url: str = ""
    federation: str = "default"
    id: str | None = None
    state: Path | None = None
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    connect_timeout: float = 15.0
    credentials: Path | None = None

    def __post_init__(self) -> None:
        provider_names(self.providers)
        check_name("federation", self.federation)
        if self.id is not None:
            check_name("device id", self.id)
        if not 0.0 < self.connect_timeout < 1e6:
            raise ConfigError(f"connect_timeout is {self.connect_timeout}, it must be above 0 and below 1e6")

    @property
    def device(self) -> str | None:
        """The device id, if one was given or kept."""
        if self.id is not None:
            return self.id
        try:
            kept = ((self.state or default_folder(self.federation)) / "id").read_text(encoding="utf-8")[:256].strip()
            return check_name("device id", kept)
        except (OSError, ValueError, FedzoError):
            return None


def diagnose(settings: DoctorSettings) -> Iterator[Check]:
    """Check one thing after the other, each independent of how the others end.

    Yields:
        A finding as soon as it is known.

    Raises:
        ConfigError: There is no such profile.
    """
    profile = load_profile(settings.profile) if settings.profile else None
    yield from _software()
    artifact, missing = _artifact(settings.artifact)
    if missing is not None:
        yield missing
    yield from _runtime(settings, with_artifact=artifact is not None)
    yield from _known_answers()
    yield _denormals()
    yield _clock(settings)
    yield _disk(settings, artifact)
    yield from _memory(profile, artifact)
    if settings.url:
        yield from _broker(settings)


def verdict(checks: list[Check]) -> None:
    """Raise if a check failed.

    Raises:
        SelfTestError: It names the checks that failed.
    """
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise SelfTestError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _software() -> Iterator[Check]:
    versions = installed_versions()
    processor = this_processor()
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Check("software", "ok", text)
    yield Check("processor", "ok", " ".join(filter(None, (processor.machine, processor.core, processor.board))))
    bad = known_bad(versions["onnxruntime"], processor)
    if bad is not None:
        detail = f"{bad.version} {bad.what}: {bad.issue}"
        yield Check("onnxruntime release", "fail" if bad.certain else "warn", detail, _OTHER_RELEASE)


def _artifact(folder: Path | None) -> tuple[Artifact | None, Check | None]:
    if folder is None:
        return None, None
    try:
        return load_artifact(folder), None
    except FedzoError as error:
        return None, Check("artifact", "fail", error.message, error.hint)


def _runtime(settings: DoctorSettings, *, with_artifact: bool) -> Iterator[Check]:
    """Load and run ONNX Runtime in a child process."""
    command = [sys.executable, "-m", "fedzo.edge_runtime.inference.forward_check"]
    for name in provider_names(settings.providers):
        command += ["--provider", name]
    command += ["--strict-providers"] if settings.strict_providers else []
    command += ["--artifact", str(settings.artifact)] if with_artifact else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=CHILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as expired:
        output: object = expired.stdout  # bytes, whatever text=True says
        name, stage = _stage(output.decode(errors="replace") if isinstance(output, bytes) else str(output or ""))
        yield Check(name, "fail", f"{stage} took more than {CHILD_TIMEOUT_S:g} s", _OTHER_RELEASE)
        return
    except OSError as error:
        yield Check("onnxruntime", "fail", f"no process to try it in: {error.strerror or error}")
        return
    name, stage = _stage(done.stdout)
    last, _, text = (done.stdout.splitlines() or [""])[-1].partition(" ")
    if done.returncode < 0:
        yield Check(name, "fail", f"{stage} died with {_signal(-done.returncode)}", _OTHER_RELEASE)
    elif last == "failed":
        answer = json.loads(text)
        yield Check(name, "fail", answer["message"], answer["hint"])
    elif done.returncode or last != "done":
        line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Check(name, "fail", f"{stage} failed: {line[:300]}", _OTHER_RELEASE)
    else:
        yield from _answers(json.loads(text))


def _answers(answer: dict[str, Any]) -> Iterator[Check]:
    """What the child found when it came to its end."""
    detail = f"{answer['onnxruntime']} runs; a small network is right within {answer['difference']:.1e}"
    if answer["denormals"]:
        yield Check("onnxruntime", "ok", detail)
    else:
        yield Check("onnxruntime", "fail", f"{detail}, but numpy has lost its denormals", _OTHER_RELEASE)
    detail = f"{answer['provider']} of {', '.join(answer['available'])}"
    if answer["provider"] == answer["wanted"]:
        yield Check("execution providers", "ok", detail)
    else:
        detail += f"; {answer['wanted']} is not there or did not start"
        yield Check("execution providers", "warn", detail, "--strict-providers makes this an error")
    for what in ("loss", "predictions"):
        found = answer.get("golden", {}).get(what)
        if found is not None and "message" in found:
            yield Check(f"golden {what}", "fail", found["message"], found["hint"])
        elif found is not None:
            detail = f"right within {found['difference']:.1e}, {found['tolerance']:.1e} is allowed"
            yield Check(f"golden {what}", "ok", detail)
        elif "golden" in answer:
            yield Check(f"golden {what}", "warn", "the artifact holds none", "export it again with this release")


def _stage(output: str) -> tuple[str, str]:
    """Name of the check that the child was at when it ended, and what it was doing."""
    stages = [line for line in output.splitlines() if line in _STAGES]
    if not stages:
        return "onnxruntime", "starting Python"
    name = "execution providers" if stages[-1] == "providers" else stages[-1]
    return name if name.startswith(("golden", "execution")) else "onnxruntime", _STAGES[stages[-1]]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _known_answers() -> Iterator[Check]:
    for known in KNOWN_ANSWERS:
        started = time.monotonic()
        yield _guarded(known.name, lambda known=known: known.check()[:16], started)  # type: ignore[misc]


def _guarded(name: str, compute: Callable[[], str], started: float) -> Check:
    try:
        answer = compute()
    except FedzoError as error:
        return Check(name, "fail", error.message, error.hint)
    except Exception as error:  # noqa: BLE001 (a broken numpy may raise anything)
        return Check(name, "fail", f"{type(error).__name__}: {error}"[:300], "reinstall numpy from an official wheel")
    return Check(name, "ok", f"{answer}, {1e3 * (time.monotonic() - started):.0f} ms")


def _denormals() -> Check:
    if keeps_denormals():
        return Check("denormals", "ok", "kept")
    if this_processor().machine.startswith("armv"):
        return Check("denormals", "warn", "flushed to zero, as by every 32-bit Arm processor; fedzo does not need them")
    return Check("denormals", "fail", "flushed to zero", "some library set the processor to fast mathematics")


def _clock(settings: DoctorSettings) -> Check:
    now = dt.datetime.now(tz=dt.timezone.utc)
    shown = f"{now:%Y-%m-%d %H:%M} UTC"
    if now >= BUILT:
        return Check("clock", "ok", shown)
    detail = f"{shown}, before this release was made ({BUILT:%Y-%m-%d})"
    secured = settings.url.startswith("mqtts:")
    return Check(
        "clock", "fail" if secured else "warn", detail, "set it: no certificate is valid yet" if secured else ""
    )


def _disk(settings: DoctorSettings, artifact: Artifact | None) -> Check:
    wanted = settings.state or default_folder(settings.federation)
    folder = wanted
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    hint = "free some space, or give another folder with --state"
    try:
        free_mib = shutil.disk_usage(folder).free / (1 << 20)
    except OSError as error:
        return Check("disk", "fail", f"{wanted} cannot be used: {error.strerror or error}", hint)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check(
            "disk", "fail", f"{wanted} cannot be written by this user", "make it writable, or give another --state"
        )
    # Graphs, manifest, mask and one report; each is written beside its old version.
    graphs = sum(graph.size for graph in artifact.manifest.graphs) if artifact else 1 << 20
    needed_mib = 2 * (graphs + (artifact.manifest.layout.size if artifact else 0)) / (1 << 20) + 1
    detail = f"{free_mib:,.0f} MiB free in {folder}"
    if free_mib < needed_mib:
        return Check("disk", "fail", f"{detail}, {needed_mib:.0f} are needed", hint)
    return Check("disk", "warn" if free_mib < _LITTLE_DISK_MIB else "ok", detail)


def _memory(profile: Profile | None, artifact: Artifact | None) -> Iterator[Check]:
    total, available = total_mib(), available_mib()
    if profile is not None:
        machine = this_processor().machine
        if machine != profile.machine:
            detail = f"{profile.name} is for {profile.machine}, this machine is {machine}"
            yield Check("profile", "warn", detail, "choose another one: fedzo-device profiles")
    budget, whose = (total, "this machine") if profile is None else (float(profile.ram_budget_mib), profile.name)
    if not total:
        yield Check("memory", "warn", "this system does not tell how much there is")
    elif total < budget:
        hint = "choose another --profile, or set --ram-budget-mib lower"
        yield Check("memory", "fail", f"{total:.0f} MiB in all, the budget of {whose} is {budget:.0f}", hint)
    else:
        needed = PROCESS_FLOOR_MIB if profile is None else budget
        detail = f"{available:.0f} of {total:.0f} MiB free" + (f", the budget is {budget:.0f}" if profile else "")
        yield Check("memory", "ok" if available >= needed else "warn", detail, _tight(available, needed))
    if artifact is not None and budget:
        sizes = RunSizes(threads=profile.threads if profile else 1)
        plan = plan_board(artifact.manifest, budget, sizes)
        peak = plan.peak
        detail = f"{artifact.manifest.model} needs {peak.memory.planned_peak_mib:.1f} MiB in {peak.phase}"
        detail += f", {whose} has {budget:.0f}"
        refused = next((phase for phase in plan.phases if phase.refusal), None)
        yield Check("plan", "ok" if plan.fits else "fail", detail, refused.hint if refused else "")


def _tight(available: float, needed: float) -> str:
    return "" if available >= needed else f"stop other programs: {needed - available:.0f} MiB are missing"


def _broker(settings: DoctorSettings) -> Iterator[Check]:
    timeout_s = settings.connect_timeout
    try:
        if settings.credentials is not None:
            bundle = DeviceBundle.load(settings.credentials)
            access = BrokerAccess(settings.url, bundle.federation, bundle.device, timeout_s=timeout_s, bundle=bundle)
        else:
            access = BrokerAccess(
                settings.url, settings.federation, settings.device, settings.username, settings.password_file,
                settings.ca, settings.cert, settings.key, timeout_s,
            )  # fmt: skip
        for name, detail, warning in broker_findings(access):
            yield Check(name, "warn" if warning else "ok", detail, warning)
    except (FedzoError, OSError) as error:
        message, hint = describe(error)
        yield Check("broker", "fail", message, hint)
