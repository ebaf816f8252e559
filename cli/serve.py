"""`fedzo serve`: run a federation, from enrolment to the last evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command import ConfigOption, ShowConfigOption, command
from .number_list import number_list
from .output import Output
from .run_options import SETTINGS, with_run_options
from .stop_signals import StopSignals

__all__ = ["register"]

_BROKER = "Broker"
_OPERATIONS = "Operations"


_PLACE = {name: name for name in ("runs", "broker", "host", "port", "federation", "log_format")}
"""Options with a default of their own, and what they set."""


def _settings_class() -> type[Any]:
    from .serve_settings import ServeSettings

    return ServeSettings


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app, settings_class=_settings_class, settings={**SETTINGS, **_PLACE})
    @with_run_options
    def serve(
        output: Output,
        artifact: Annotated[Path | None, typer.Argument(metavar="ARTIFACT", help="Folder of fedzo export.")] = None,
        config: ConfigOption = None,
        show: ShowConfigOption = False,
        resume: Annotated[
            Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run; its settings hold.")
        ] = None,
        runs: Annotated[Path | None, typer.Option("--runs", help="Where run folders lie.")] = None,
        name: Annotated[str | None, typer.Option("--run", help="Run id [default: model and time].")] = None,
        continue_run: Annotated[
            bool | None, typer.Option("--continue", help="Go on with the run of --run, if it has begun.")
        ] = None,
        test_data: Annotated[
            Path | None, typer.Option("--test-data", help="The server's own test set: what fedzo-device join takes.")
        ] = None,
        test_mean: Annotated[
            str | None,
            typer.Option(metavar="X[,X...]", help="Subtracted from its inputs, after scaling bytes to 0..1."),
        ] = None,
        test_std: Annotated[
            str | None, typer.Option(metavar="X[,X...]", help="What its inputs are divided by.")
        ] = None,
        test_pad: Annotated[
            bool | None, typer.Option("--test-pad", help="Center its smaller images in zeros (28x28 in 32x32).")
        ] = None,
        *,
        run_flags: dict[str, Any],
        broker: Annotated[
            str | None, typer.Option(help="auto, mosquitto, embedded, or a URL.", rich_help_panel=_BROKER)
        ] = None,
        host: Annotated[
            str | None, typer.Option(help="Address that a managed broker listens on.", rich_help_panel=_BROKER)
        ] = None,
        port: Annotated[int | None, typer.Option(help="Its port; 0 for a free one.", rich_help_panel=_BROKER)] = None,
        federation: Annotated[
            str | None, typer.Option(help="Topic level; several federations share a broker.", rich_help_panel=_BROKER)
        ] = None,
        username: Annotated[str | None, typer.Option(help="For a broker by URL.", rich_help_panel=_BROKER)] = None,
        password_file: Annotated[
            Path | None, typer.Option(help="For a broker by URL; or FEDZO_PASSWORD.", rich_help_panel=_BROKER)
        ] = None,
        ca: Annotated[Path | None, typer.Option(help="CA of a mqtts:// broker.", rich_help_panel=_BROKER)] = None,
        credentials: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help="Folder of fedzo credentials: TLS, logins and rights; the port is 8883 then.",
                rich_help_panel=_BROKER,
            ),
        ] = None,
        metrics: Annotated[
            str | None,
            typer.Option(
                metavar="HOST:PORT",
                help="Serve /metrics, /healthz and /readyz there, without a password.",
                rich_help_panel=_OPERATIONS,
            ),
        ] = None,
        log_format: Annotated[
            str | None, typer.Option(help="text, or json: one object a line.", rich_help_panel=_OPERATIONS)
        ] = None,
        log_file: Annotated[
            Path | None, typer.Option(help="Log there instead of to stderr; rotated.", rich_help_panel=_OPERATIONS)
        ] = None,
        log_level: Annotated[
            str | None,
            typer.Option(
                help="debug, info, warning or error [default: info, of text on stderr warning].",
                rich_help_panel=_OPERATIONS,
            ),
        ] = None,
        systemd: Annotated[
            bool,
            typer.Option(
                "--systemd",
                help="Print a systemd unit that runs this command with few rights, and stop.",
                rich_help_panel=_OPERATIONS,
            ),
        ] = False,
        systemd_user: Annotated[
            str,
            typer.Option(
                metavar="NAME", help="Its user [default: systemd makes one while it runs].", rich_help_panel=_OPERATIONS
            ),
        ] = "",
    ) -> None:
        """Serve a run: wait for devices, prune, train, evaluate. Ends by itself; a stopped run can be resumed.

        Every setting can also stand in a TOML file (--config) or in the environment (FEDZO_TRAINING_ROUNDS=500).

        Example:
            $ fedzo serve artifact --devices 8 --rounds 500 --k 64
            $ fedzo serve artifact --host 0.0.0.0 --credentials credentials
            $ fedzo serve artifact --config run.toml --broker mqtts://broker.example:8883
            $ fedzo serve --resume runs/lenet5-20260101-120000-1
        """
        flags: dict[str, Any] = {
            "artifact": artifact,
            "resume": resume,
            "runs": runs,
            "run": name,
            "continue_run": continue_run,
            "test_data": test_data,
            "test_mean": number_list(test_mean, "--test-mean"),
            "test_std": number_list(test_std, "--test-std"),
            "test_pad": test_pad,
            **run_flags,
            "broker": broker,
            "host": host,
            "port": port,
            "federation": federation,
            "username": username,
            "password_file": password_file,
            "ca": ca,
            "credentials": credentials,
            "metrics": metrics,
            "log_format": log_format,
            "log_file": log_file,
            "log_level": log_level,
        }
        with StopSignals() as signals:
            from .serve_run import serve_run

            serve_run(output, flags, config, signals, show=show, unit_user=systemd_user if systemd else None)
        if signals.came_early:
            output.say("stopped before there was a server; no run was begun or changed")
            output.result({"run": resume.name if resume else name, "phase": "not served"})
