"""`fedzo broker`: looks at a broker that somebody else runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command, group
from .output import Output

__all__ = ["register"]

_DEVICE = "Rights of a device"


def register(app: typer.Typer) -> None:
    """Adds the group to the app."""
    brokers = group(
        app,
        "broker",
        """Look at an MQTT broker.

        Example:
            $ fedzo broker check mqtt://localhost:1883
        """,
    )

    @command(brokers)
    def check(
        output: Output,
        url: Annotated[str, typer.Argument(metavar="URL", help="mqtt://HOST[:1883], or mqtts://HOST[:8883] for TLS.")],
        federation: Annotated[str, typer.Option(help="Below whose topics to try.")] = "default",
        devices: Annotated[int, typer.Option(metavar="N", help="Boards that the broker should serve.")] = 100,
        username: Annotated[
            str | None, typer.Option(help="Login with the rights of the server [default: the one in the URL].")
        ] = None,
        password_file: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Its first line [default: FEDZO_PASSWORD].")
        ] = None,
        ca: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Certificates that may sign the broker's.")
        ] = None,
        cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Own certificate.")] = None,
        key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
        credentials: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Folder of fedzo credentials: the server's login, instead of all these."),
        ] = None,
        device_credentials: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Folder of a device: try its rights too.", rich_help_panel=_DEVICE),
        ] = None,
        device: Annotated[
            str | None, typer.Option("--id", metavar="ID", help="Device without a folder.", rich_help_panel=_DEVICE)
        ] = None,
        device_password_file: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Its password.", rich_help_panel=_DEVICE)
        ] = None,
        timeout: Annotated[float, typer.Option(metavar="S", help="Longest wait for one answer.")] = 10.0,
    ) -> None:
        """Try with throw-away clients whether a broker gives what fedzo needs, and leave nothing behind.

        Every line is ok, warn (fedzo works, but worse), FAIL (it does not) or skip. Ends with exit code 5 if one
        fails. Give the check a login of its own: brokers that bind client ids to logins throw out the other one.

        Example:
            $ fedzo broker check mqtt://localhost:1883
            $ fedzo broker check mqtts://broker:8883 --credentials credentials --json
        """
        from ..broker_server.brokers.check import BrokerCheck, Finding, verdict
        from ..edge_runtime.connection.broker_check import BrokerAccess, describe
        from ..edge_runtime.installation.device_bundle import DeviceBundle
        from ..protocol.errors import BrokerError, ConfigError

        if device_credentials is not None and (device is not None or device_password_file is not None):
            raise ConfigError("--device-credentials stands for --id and --device-password-file", hint="leave one away")
        # Without its own file the device would be tried with FEDZO_PASSWORD, the server's.
        if (device is None) != (device_password_file is None):
            raise ConfigError(
                "a device's rights are tried with its id and its password",
                hint="give --id and --device-password-file, or --device-credentials",
            )
        password = None
        if credentials is not None:
            from ..broker_server.security.credential_folder import CredentialFolder

            if username or password_file or ca or cert or key:
                raise ConfigError("--credentials stands for user, password and certificates; give one or the other")
            folder = CredentialFolder(credentials)
            login = folder.registry.credentials().server
            username, password = login.username, login.password
            ca, cert, key = (credentials / name for name in ("ca.pem", "server.pem", "server.key"))
        access = BrokerAccess(url, federation, None, username, password_file, ca, cert, key, timeout_s=timeout)
        tried = None
        if device_credentials is not None:
            bundle = DeviceBundle.load(device_credentials)
            tried = BrokerAccess(url, federation, bundle.device, timeout_s=timeout, bundle=bundle)
        elif device is not None:
            tried = BrokerAccess(url, federation, device, None, device_password_file, ca, timeout_s=timeout)
        asked = BrokerCheck(access, devices, tried, password)
        findings: list[Finding] = []
        try:
            with output.progress("trying the broker"):
                findings.extend(asked.findings())
        except OSError as error:
            message, hint = describe(error)
            raise BrokerError(f"{url.rpartition('@')[2]}: {message}", hint=hint) from None
        rows = [(f.name, "FAIL" if f.status == "fail" else f.status, f.detail, f.hint) for f in findings]
        output.table(("check", "result", "found", "hint"), rows)
        output.result({"url": url.rpartition("@")[2], "findings": findings})
        verdict(findings)
