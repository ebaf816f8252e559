"""What `fedzo simulate` does once its flags are read: settings, pool, live line, table."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..protocol.errors import ConfigError
from .command import show_config
from .config import ConfigFile, Resolved, find_file, resolve
from .output import Output
from .setting_notes import note_settings
from .simulate_settings import SimulateSettings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: many small products, one core each

from ..edge_runtime.storage.artifact import load_artifact
from ..simulation.pools import InlinePool, WorkPool
from ..simulation.process_pool import ProcessPool
from ..simulation.result import Progress, SimulationResult
from ..simulation.simulate import simulate

__all__ = ["simulate_run"]


def simulate_run(
    output: Output, flags: Mapping[str, Any], config: Path | None, options: Mapping[str, str], *, show: bool
) -> None:
    """Simulate one run.

    Args:
        output: Of the command.
        flags: Values of options by dotted name.
        config: File that was named.
        options: What the options are called, by dotted name.
        show: Print the settings, and stop.

    Raises:
        FedzoError: See :func:`~fedzo.simulation.simulate.simulate`.
    """
    file = find_file(config)
    resolved = resolve(SimulateSettings, flags=flags, file=file, options=options)
    artifact = resolved.settings.artifact
    if artifact is None and not show:
        raise ConfigError("no artifact is named", hint="fedzo simulate ARTIFACT --data FILE")
    if artifact is not None:
        resolved = _resolved(flags, file, artifact, options)
    settings = resolved.settings
    note_settings(output, resolved, settings)
    if show or artifact is None:
        show_config(output, resolved)
        return
    if settings.data is None:
        raise ConfigError("no data are named", hint=f"fedzo simulate {artifact} --data FILE")
    if settings.output is not None:
        _check_output(settings.output)
    pool: WorkPool = InlinePool() if settings.processes == 1 else ProcessPool(settings.processes)
    with _watched(output, settings.training.rounds) as (watch, seen):
        try:
            found = simulate(
                artifact,
                settings.run_settings(),
                settings.data,
                settings.test_data,
                settings.world,
                pool=pool,
                on_progress=watch,
            )
        except KeyboardInterrupt:
            _give(output, _so_far(seen, settings), settings.output)
            raise
    _show(output, found)
    _give(output, _answer(found, settings), settings.output)


def _check_output(path: Path) -> None:
    """Refuse, before hours of computing, a file that cannot be written at their end.

    Raises:
        ConfigError: It cannot.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {path}", hint="make it first")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint="name a file for the result")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # neither is a pipe or a device
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _give(output: Output, answer: dict[str, Any], path: Path | None) -> None:
    """Write and print the answer; where it cannot be written, it is on stdout all the same.

    Raises:
        ConfigError: It could not be written.
    """
    text = json.dumps(answer, indent=1)
    try:
        if path is not None:
            path.write_text(text + "\n")
    except OSError as error:
        if not output.json:
            output.text(text)
        raise _unwritable(path, error, "; the result is on stdout") from error
    finally:
        output.result(answer)


def _unwritable(path: Path | None, error: OSError, more: str = "") -> ConfigError:
    return ConfigError(
        f"cannot write {path}: {error.strerror or error}{more}", hint="name a file in a folder that you may write to"
    )


def _resolved(
    flags: Mapping[str, Any], file: ConfigFile | None, artifact: Path, options: Mapping[str, str]
) -> Resolved[SimulateSettings]:
    profile = {"sparsity": load_artifact(artifact).manifest.sparsity}
    return resolve(SimulateSettings, flags=flags, file=file, profile=profile, profile_name="artifact", options=options)


def _answer(found: SimulationResult, settings: SimulateSettings) -> dict[str, Any]:
    bare = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
    del bare["weights"], bare["mask"]
    rows = {name: [dataclasses.asdict(row) for row in bare[name]] for name in ("curve", "rounds")}
    survivors = {"survivors": found.mask.n_survivors, "parameters": found.mask.layout.size}
    return {"accuracy": found.accuracy, **survivors, **bare, **rows, "settings": _named(settings)}


def _so_far(seen: list[Progress], settings: SimulateSettings) -> dict[str, Any]:
    """What there is of a simulation that was interrupted."""
    last = seen[-1] if seen else None
    return {
        "interrupted": True,
        "accuracy": last.accuracy if last else None,
        "sample_forwards": last.sample_forwards if last else 0.0,
        "virtual_s": last.virtual_s if last else 0.0,
        "curve": [dataclasses.asdict(row) for row in last.curve] if last else [],
        "rounds": [dataclasses.asdict(row) for row in last.training] if last else [],
        "settings": _named(settings),
    }


def _named(settings: SimulateSettings) -> dict[str, Any]:
    """Settings with their paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in _flat(settings).items()}


def _flat(settings: SimulateSettings) -> dict[str, Any]:
    return {each.name: _plain(getattr(settings, each.name)) for each in dataclasses.fields(settings)}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


@contextmanager
def _watched(output: Output, total: int) -> Iterator[tuple[Callable[[Progress], None], list[Progress]]]:
    """A live bar on a terminal; elsewhere a line for every evaluation. The list holds the latest progress."""
    seen = {"round": 0, "evaluated": -1}
    latest: list[Progress] = []

    def text(progress: Progress) -> str:
        loss = "" if progress.mean_loss is None else f" loss {progress.mean_loss:.4f}"
        accuracy = "" if progress.accuracy is None else f" accuracy {progress.accuracy:.2%}"
        virtual = f" virtual {progress.virtual_s:.0f} s" if progress.virtual_s else ""
        return f"{progress.phase:<9} {progress.ready} devices{loss}{accuracy}{virtual}"

    with output.progress("starting the virtual devices", total) as advance:

        def watch(progress: Progress) -> None:
            latest[:] = [progress]
            if output.interactive:
                advance(progress.round - seen["round"], text(progress))
            elif progress.phase == "evaluate" and progress.round != seen["evaluated"]:
                output.say(f"update {progress.round}/{total}: {text(progress)}")
                seen["evaluated"] = progress.round
            seen["round"] = progress.round

        yield watch, latest


def _beside(found: SimulationResult) -> list[tuple[str, object]]:
    """Passes that are not training, where there were some."""
    of_tuning, of_scoring = found.tuning_sample_forwards, found.scoring_sample_forwards
    rows: list[tuple[str, object]] = [("of scoring", f"{of_scoring:.0f}")] if of_scoring else []
    if of_tuning:
        rows.append(("of the range test", f"{of_tuning:.0f}"))
        rows.append(("learning rate that it found", f"{found.learning_rate:.2e}"))
    return rows


def _show(output: Output, found: SimulationResult) -> None:
    accuracy = "not evaluated" if found.accuracy is None else f"{found.accuracy:.2%}"
    rows: list[tuple[str, object]] = [
        ("held-out accuracy", accuracy),
        ("updates", len(found.rounds)),
        ("virtual devices", found.devices),
        ("sample-forwards of training", f"{found.sample_forwards:.0f}"),
        *_beside(found),
        ("scalars per device and round", round(found.scalars_per_device_round, 1)),
        ("forward passes per device and round", round(found.queries_per_device_round, 1)),
        ("bytes up per participant and round", round(found.bytes_up_per_device_round, 1)),
        ("bytes down per device and round", round(found.bytes_down_per_device_round, 1)),
        ("survivors", f"{found.mask.n_survivors} of {found.mask.layout.size}"),
        ("losses of devices", found.dropouts),
        ("late reports", found.late_reports),
        ("declined reports", found.declined),
        ("virtual seconds per round", round(found.virtual_s_per_round, 3)),
        ("weights digest", found.digest),
        ("all devices agree", "yes" if found.devices_agree else "no"),
        ("seconds", round(found.wall_s, 1)),
        ("part of them inside engines", f"{found.engine_share:.0%} on {found.processes} processes"),
        ("peak RSS", f"{found.peak_rss_mib:.0f} MiB"),
    ]
    output.table(("simulation", ""), rows)
