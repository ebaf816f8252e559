"""`fedzo doctor`: the checks of `fedzo-device doctor`, for the machine that the server side is installed on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .output import Output

__all__ = ["register"]

_BROKER = "Broker"


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def doctor(
        output: Output,
        artifact: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Folder of fedzo export: check its known answer and memory.")
        ] = None,
        profile: Annotated[str, typer.Option(metavar="NAME", help="Hardware profile of this machine.")] = "",
        provider: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME", help="Execution provider, in order of preference, such as cuda [default: cpu]."
            ),
        ] = None,
        strict_providers: Annotated[
            bool, typer.Option("--strict-providers", help="Fail when the first one does not start.")
        ] = False,
        url: Annotated[
            str,
            typer.Option(metavar="URL", help="Check address, TLS, credentials and rights.", rich_help_panel=_BROKER),
        ] = "",
        federation: Annotated[str, typer.Option(help="Its topics.", rich_help_panel=_BROKER)] = "default",
        device: Annotated[
            str | None, typer.Option("--id", metavar="ID", help="Device id.", rich_help_panel=_BROKER)
        ] = None,
        state: Annotated[
            Path | None, typer.Option(metavar="DIR", help="State folder [default: ~/.local/state/fedzo/FEDERATION].")
        ] = None,
        username: Annotated[
            str | None, typer.Option(help="MQTT user [default: the id].", rich_help_panel=_BROKER)
        ] = None,
        password_file: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Its first line [default: FEDZO_PASSWORD].", rich_help_panel=_BROKER),
        ] = None,
        ca: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Certificates that may sign the broker's.", rich_help_panel=_BROKER),
        ] = None,
        cert: Annotated[
            Path | None, typer.Option(metavar="FILE", help="The device's certificate.", rich_help_panel=_BROKER)
        ] = None,
        key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.", rich_help_panel=_BROKER)] = None,
        credentials: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="All of these in one folder, from fedzo credentials issue.", rich_help_panel=_BROKER
            ),
        ] = None,
        connect_timeout: Annotated[
            float, typer.Option(metavar="S", help="Seconds for the connection.", rich_help_panel=_BROKER)
        ] = 15.0,
    ) -> None:
        """Check this machine, one line a check: ok, warn or FAIL. Ends with exit code 7 if a check fails.

        ONNX Runtime is tried in a process of its own, since some releases kill it on some boards.

        Example:
            $ fedzo doctor --artifact artifact
            $ fedzo doctor --url mqtts://broker:8883 --ca ca.pem --id pi-kitchen --password-file password
        """
        from ..edge_runtime.installation.doctor import Check, DoctorSettings, diagnose, verdict

        settings = DoctorSettings(
            artifact=artifact,
            profile=profile,
            providers=tuple(provider or ("cpu",)),
            strict_providers=strict_providers,
            url=url,
            federation=federation,
            id=device,
            state=state,
            username=username,
            password_file=password_file,
            ca=ca,
            cert=cert,
            key=key,
            connect_timeout=connect_timeout,
            credentials=credentials,
        )
        checks: list[Check] = []
        for check in diagnose(settings):
            checks.append(check)
            output.text(str(check))
        output.result({"checks": checks})
        verdict(checks)
