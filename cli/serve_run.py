"""What `fedzo serve` does once its flags are read: settings, run folder, broker, server, summary."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..broker_server.brokers.external import ExternalBroker
from ..broker_server.history.replay import begin_run, run_document
from ..broker_server.history.run_folder import PLACE_NAME, RunFolder, default_name, has_begun
from ..broker_server.history.summary import Summary, summarise
from ..broker_server.journal import SqliteJournal
from ..broker_server.server import Progress, Server
from ..broker_server.synflow import check_synflow
from ..broker_server.tuning import SUFFIX, follow_up, plan_follow_up
from ..edge_runtime.datasets.data import Samples, load_dataset
from ..edge_runtime.storage.artifact import load_artifact
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import BrokerError, ConfigError, DataError, QuorumError
from ..protocol.perturbation.blocks import blocks_of
from ..protocol.pruning.mask import Mask
from ..protocol.pruning.mask_choice import check_pruning
from ..protocol.settings import RunSettings
from ..protocol.wire.documents import RunDocument
from .command import show_config
from .config import ConfigFile, Resolved, find_file, resolve
from .output import Output
from .run_options import OPTIONS
from .serve_access import TLS_PORT, ServeAccess, folder_federation
from .serve_operations import Operations
from .serve_settings import PATHS, PLACE, ServeSettings
from .serve_unit import print_unit
from .setting_notes import note_settings
from .stop_signals import StopSignals

__all__ = ["serve_run"]

_OPTIONS = {**OPTIONS, "continue_run": "--continue"}
"""What options are called where their name does not follow from that of the setting."""


def serve_run(
    output: Output,
    flags: Mapping[str, Any],
    config: Path | None,
    signals: StopSignals,
    *,
    show: bool,
    unit_user: str | None = None,
) -> None:
    """Serve one run until it ends or ``signals`` stop it; or print its settings, or a unit that serves it.

    Raises:
        FedzoError: See ``Server.serve`` and the parts that are opened before.
    """
    file = find_file(config)
    first = resolve(ServeSettings, flags=flags, file=file, options=_OPTIONS)
    if first.settings.resume is not None:
        resolved, folder = _resumed(flags, file, first.settings.resume)
    else:
        is_bare = show and first.settings.artifact is None
        resolved, folder = first if is_bare else _fresh(flags, file, first.settings.artifact), None
    note_settings(output, resolved, resolved.settings)
    if show:
        show_config(output, resolved)
        return
    settings = resolved.settings
    if folder is None and settings.continue_run and unit_user is None:
        settings, folder = _continued(settings)
    if settings.credentials is not None:
        port = TLS_PORT if resolved.origins["port"].kind == "default" else settings.port
        federation = folder_federation(settings.credentials, settings.federation)
        settings = dataclasses.replace(settings, port=port, federation=federation)
    if unit_user is not None:
        print_unit(output, settings, unit_user, has_runs=resolved.origins["runs"].kind != "default")
        return
    output.start_logs(settings.log_format, settings.log_file, settings.log_level)
    _serve(output, settings, folder, signals)


def _fresh(flags: Mapping[str, Any], file: ConfigFile | None, artifact: Path | None) -> Resolved[ServeSettings]:
    if artifact is None:
        raise ConfigError("no artifact is named", hint="fedzo serve ARTIFACT, or fedzo serve --resume RUN")
    sparsity = load_artifact(artifact).manifest.sparsity
    profile = {"sparsity": sparsity}
    return resolve(ServeSettings, flags=flags, file=file, profile=profile, profile_name="artifact", options=_OPTIONS)


def _resumed(
    flags: Mapping[str, Any], file: ConfigFile | None, path: Path
) -> tuple[Resolved[ServeSettings], RunFolder]:
    fixed = [name for name, value in flags.items() if value is not None and name not in (*PLACE, "resume")]
    if fixed:
        raise ConfigError(f"a resumed run keeps its settings, {fixed[0]} too", hint="start a new run to change it")
    folder = RunFolder.open(path)
    with SqliteJournal(folder.journal_path, read_only=True) as journal:
        settings = run_document(journal, folder.path).settings
    place = _place(folder)
    paths = {name: Path(place[name]) for name in PATHS if name in place}
    profile = {**dict(_dotted(dataclasses.asdict(settings))), **place, **paths}
    return resolve(
        ServeSettings, flags=flags, file=file, profile=profile, profile_name=str(path), options=_OPTIONS
    ), folder


def _place(folder: RunFolder) -> dict[str, Any]:
    """Where a run was served before.

    Raises:
        ConfigError: Nobody knows.
    """
    try:
        place: dict[str, Any] = json.loads((folder.path / PLACE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {folder.path / PLACE_NAME}: {error}", hint="write {} into it, and give --broker and --port"
        ) from error
    return place


def _continued(settings: ServeSettings) -> tuple[ServeSettings, RunFolder | None]:
    """The run of this name, if it has begun: it must be the same one, and it stays at its port.

    Raises:
        ConfigError: There is no name, or another run has it.
    """
    if settings.run is None or settings.tune_rounds:
        raise ConfigError(
            "--continue needs --run NAME, and a run without --tune-rounds", hint="give both, or --resume RUN"
        )
    path = settings.runs / settings.run
    if not has_begun(path):
        return settings, None
    folder = RunFolder.open(path)
    with SqliteJournal(folder.journal_path, read_only=True) as journal:
        earlier = dict(_dotted(dataclasses.asdict(run_document(journal, path).settings)))
    wanted = dict(_dotted(dataclasses.asdict(settings.run_settings())))
    other = next((name for name, value in wanted.items() if earlier.get(name) != value), None)
    if other is not None:
        raise ConfigError(
            f"the run {path} began with {other} {earlier.get(other)}, not {wanted[other]}",
            hint=f"go on with it as it is: fedzo serve --resume {path}, or choose another --run",
        )
    if settings.port == 0:
        settings = dataclasses.replace(settings, port=int(_place(folder).get("port", 0)))
    return settings, folder


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, as ``resolve`` takes them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _serve(output: Output, settings: ServeSettings, folder: RunFolder | None, signals: StopSignals) -> None:
    started = time.monotonic()
    with signals.at_once():
        manifest = _manifest(settings) if folder is None else folder.artifact.manifest
        test_set = _test_set(settings, manifest)
    with ExitStack() as stack:
        operations = Operations(output, settings.metrics, stack)
        # The lock of a run is taken before its broker is started, but a new run only begins once there is one.
        journal = stack.enter_context(SqliteJournal(folder.journal_path)) if folder is not None else None
        access = ServeAccess(settings, settings.runs if folder is None else folder.path.parent)
        with signals.at_once() if isinstance(access.broker, ExternalBroker) else nullcontext():
            broker = stack.enter_context(access.broker)
        signals.check()
        if folder is None or journal is None:
            folder = _new_folder(settings, port=getattr(broker, "port", settings.port))
            journal = stack.enter_context(SqliteJournal(folder.journal_path))
            begin_run(journal, folder.document(_first_settings(folder, settings.run_settings())))
        server = _serve_one(output, settings, folder, journal, access, test_set, operations, signals)
        if not signals.received and (following := follow_up(folder, server.coordinator)) is not None:
            output.say(f"learning rate: {following.training.learning_rate:.2e}")
            folder = _next_folder(folder, following.run)
            journal = stack.enter_context(SqliteJournal(folder.journal_path))
            begin_run(journal, following)
            server = _serve_one(output, settings, folder, journal, access, test_set, operations, signals)
        summary = summarise(server.coordinator, journal, server.traffic, resumed_at=server.resumed_at)
    _report(output, folder, summary, round(time.monotonic() - started, 1))


def _serve_one(
    output: Output,
    settings: ServeSettings,
    folder: RunFolder,
    journal: SqliteJournal,
    access: ServeAccess,
    test_set: Samples | None,
    operations: Operations,
    signals: StopSignals,
) -> Server:
    """Serve the run of the folder to its end, or until a signal comes."""
    run = run_document(journal, folder.path)
    with ExitStack() as stack:
        observer = stack.enter_context(_progress(output, run))
        server = Server(
            folder,
            run,
            access.broker,
            journal,
            federation=settings.federation,
            test_set=test_set,
            observer=observer,
            telemetry=operations.telemetry,
            access=access.access,
        )
        stack.enter_context(signals.stopping(server))
        stack.enter_context(operations.serving(output, server, folder))
        access.watch(server, stack)
        output.say(f"run {run.run} in {folder.path}")
        access.tell(output)
        if not server.coordinator.finished:
            output.say(f"waiting for {run.settings.devices} devices")  # Which telemetry.joining tells of.
        try:
            server.serve()
        except (BrokerError, QuorumError) as error:
            error.hint = f"{error.hint}; then: fedzo serve --resume {folder.path}"
            raise
    return server


def _manifest(settings: ServeSettings) -> Manifest:
    assert settings.artifact is not None
    artifact = load_artifact(settings.artifact)
    _check(settings, artifact.manifest)
    check_synflow(artifact, settings)
    return artifact.manifest


def _new_folder(settings: ServeSettings, *, port: int) -> RunFolder:
    assert settings.artifact is not None
    name = settings.run
    if settings.tune_rounds:
        name = f"{name or default_name(load_artifact(settings.artifact).manifest)}{SUFFIX}"
    # Where port 0 found a free one, a resumed server must come back to it: the devices know no other.
    place = {**settings.place(), "port": port}
    return RunFolder.create(settings.runs, settings.artifact, name=name, place=json.dumps(place, indent=1) + "\n")


def _first_settings(folder: RunFolder, settings: RunSettings) -> RunSettings:
    """Those of the run that is wanted, or of the range test in front of it."""
    return plan_follow_up(folder, settings) if settings.tune_rounds else settings


def _next_folder(folder: RunFolder, run: str) -> RunFolder:
    """A folder beside another run's, with the same artifact at the same broker."""
    place = (folder.path / PLACE_NAME).read_text()
    return RunFolder.create(folder.path.parent, folder.artifact_path, name=run, place=place)


def _check(settings: ServeSettings, manifest: Manifest) -> None:
    if settings.sparsity > 0 and manifest.layout.maskable_size == 0:
        raise ConfigError(
            f"the sparsity is {settings.sparsity}, but the artifact was exported without pruning",
            hint="fedzo export ... --sparsity 0.8, or --sparsity 0 here",
        )
    check_pruning(manifest, settings)
    blocks_of(settings.training, manifest, Mask.dense(manifest.layout))  # before there is a broker or a folder


def _test_set(settings: ServeSettings, manifest: Manifest) -> Samples | None:
    if settings.test_data is None:
        return None
    try:
        dataset = load_dataset(
            settings.test_data,
            manifest.input_shape,
            manifest.n_classes,
            mean=settings.test_mean or None,
            std=settings.test_std or None,
            pad=settings.test_pad,
        )
    except DataError as error:
        error.hint = re.sub(r"--(pad|mean|std)\b", r"--test-\1", error.hint)  # what the server calls them
        raise
    return dataset.test if len(dataset.test) else dataset.train


@contextmanager
def _progress(output: Output, run: RunDocument) -> Iterator[Callable[[Progress], None]]:
    """A live bar on a terminal; elsewhere a line for every change of phase and every evaluation."""
    total, wanted = run.training.rounds, run.settings.devices
    seen: dict[str, object] = {"phase": "", "accuracy": None, "updates": 0}

    def lines(progress: Progress) -> None:
        changed = progress.phase != seen["phase"] and progress.phase not in ("enrol", "train", "evaluate")
        if changed or progress.accuracy != seen["accuracy"]:
            accuracy = "" if progress.accuracy is None else f", accuracy {progress.accuracy:.4f}"
            output.say(
                f"{progress.phase}: update {progress.updates}/{total}, "
                f"{progress.ready} of {progress.devices} devices ready{accuracy}"
            )
        seen.update(phase=progress.phase, accuracy=progress.accuracy)

    if not output.interactive:
        yield lines
        return
    with output.progress("waiting for devices", total) as advance:

        def bar(progress: Progress) -> None:
            accuracy = "" if progress.accuracy is None else f" accuracy {progress.accuracy:.1%}"
            devices = max(progress.devices, wanted if progress.phase == "enrol" else 0)
            text = f"{progress.phase:<9} {progress.ready}/{devices} devices{accuracy}"
            advance(progress.updates - int(str(seen["updates"])), text)
            seen["updates"] = progress.updates

        yield bar


def _report(output: Output, folder: RunFolder, summary: Summary, wall_s: float) -> None:
    done = summary.phase == "done"
    accuracy = "not evaluated" if summary.accuracy is None else f"{summary.accuracy:.2%}"
    rows: list[tuple[str, object]] = [
        ("state", "done" if done else f"stopped in phase {summary.phase}"),
        ("held-out accuracy", accuracy),
        ("accuracy is of the weights", summary.evaluated),
        ("learning rate", f"{summary.learning_rate:.2e}"),
        ("updates", summary.rounds),
        ("loss queries", summary.queries),
        ("bytes up per device and round", summary.bytes_up_per_device_round),
        ("bytes down per device and round", summary.bytes_down_per_device_round),
        ("peak RSS of a device", f"{summary.device_peak_rss_mib} MiB"),
        ("survivors", f"{summary.survivors} of {summary.parameters}"),
        ("weights digest", summary.weights_digest),
        ("all devices agree", _agreement(summary)),
        *(("excused", text) for text in summary.excused),
        *(("refused", text) for text in summary.refusals),
        ("seconds", wall_s),
    ]
    output.table(("run", summary.run), rows)
    if not done:
        output.say(f"go on with: fedzo serve --resume {folder.path}")
    output.result({**dataclasses.asdict(summary), "folder": folder.path, "wall_s": wall_s})


def _agreement(summary: Summary) -> str:
    if summary.digests_agree is None:
        return "not all have said" if summary.phase == "done" else "not known before the end"
    return "yes" if summary.digests_agree else "no"
