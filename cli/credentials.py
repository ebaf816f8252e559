"""`fedzo credentials`: certificates, logins and rights of a federation, out of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command, group
from .output import Output

if TYPE_CHECKING:
    from ..broker_server.security.credential_folder import CredentialFolder

__all__ = ["register"]

_DAYS = 825

FolderOption = Annotated[
    Path, typer.Option("--folder", metavar="DIR", envvar="FEDZO_CREDENTIALS", help="Where all credentials lie.")
]
DaysOption = Annotated[int, typer.Option("--days", help="Validity of new certificates.")]
HostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--host", metavar="HOST", help="Name or address of the broker; may be repeated [default: this machine's name]."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the group to the app."""
    credentials = group(
        app,
        "credentials",
        """Let in your own boards and nobody else: a certificate authority, certificates, passwords and topic rights.

        A change takes effect within seconds, without a restart of the server or of a broker that it started.

        Example:
            $ fedzo credentials init --host server.local
            $ fedzo credentials issue kitchen garden
            $ fedzo serve artifact --host 0.0.0.0 --credentials credentials
            $ fedzo credentials revoke garden
        """,
    )
    command(credentials, "init")(init)
    command(credentials, "issue")(issue)
    command(credentials, "revoke")(revoke)
    command(credentials, "list")(show)


def init(
    output: Output,
    folder: FolderOption = Path("credentials"),
    host: HostOption = None,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "default",
    days: DaysOption = _DAYS,
) -> None:
    """Make the folder: an authority, the broker's certificate and the key that signs runs.

    For a folder that is there already, the broker's certificate is renewed, with other hosts if some are given.

    Example:
        $ fedzo credentials init --host server.local --host 192.168.1.10
    """
    from ..broker_server.security.credential_folder import REGISTRY_NAME, CredentialFolder

    if (folder / REGISTRY_NAME).is_file():
        made = CredentialFolder(folder)
        made.renew_server(hosts=host or (), days=days)
        output.say("the broker has a new certificate; one that runs takes it at its next start")
    else:
        made = CredentialFolder.create(folder, federation=federation, hosts=host or (), days=days)
        output.say(f"made {folder}: keep it to yourself, {folder / 'ca.key'} above all")
    registry = made.registry
    key = made.signer().public_key.hex()
    output.table(
        ("federation", registry.federation),
        [("hosts", ", ".join(registry.hosts)), ("certificate until", registry.server_expires[:10]), ("run key", key)],
    )
    output.say(f"next: fedzo credentials issue DEVICE --folder {folder}")
    output.result({"folder": made.path, "hosts": registry.hosts, "expires": registry.server_expires, "run_key": key})


def issue(
    output: Output,
    devices: Annotated[list[str], typer.Argument(metavar="DEVICE...", help="Device ids, of a-z 0-9 -.")],
    folder: FolderOption = Path("credentials"),
    days: DaysOption = _DAYS,
) -> None:
    """Make the credentials of boards, or renew them. Each gets a folder to copy to it.

    A renewal keeps the password, and the old certificate holds until it ends: nothing breaks in between.

    Example:
        $ fedzo credentials issue kitchen garden
    """
    made = _open(folder)
    folders = made.issue(devices, days=days)
    for name, path in zip(devices, folders, strict=True):
        output.say(f"{path}: copy this folder to the board, then there:")
        output.say(f"  {made.join_command(name)}")
    commands = {name: made.join_command(name) for name in devices}
    output.result({"folders": dict(zip(devices, folders, strict=True)), "commands": commands})


def revoke(
    output: Output,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")],
    folder: FolderOption = Path("credentials"),
) -> None:
    """Take a board's rights: it is disconnected, and neither its certificate nor its password is good any more.

    A running `fedzo serve --credentials` sees it within seconds, as does the broker that it started. One that somebody
    else runs needs the new files. What the board reported before still counts.

    Example:
        $ fedzo credentials revoke garden
    """
    made = _open(folder)
    made.revoke(device)
    output.say(f"a broker that fedzo did not start must be given {folder / 'mosquitto'} again and reload it")
    output.say(f"{device} is revoked; `fedzo credentials issue {device}` would let it in again, with new credentials")
    output.result({"revoked": device, "admitted": sorted(made.registry.admitted())})


def show(output: Output, folder: FolderOption = Path("credentials")) -> None:
    """List the boards, until when their certificates hold, and the key that signs runs.

    Example:
        $ fedzo credentials list
    """
    made = _open(folder)
    registry, key = made.registry, made.signer().public_key.hex()
    rows = [
        (name, "revoked" if entry.revoked else "may take part", entry.expires[:10], entry.revoked[:10])
        for name, entry in sorted(registry.devices.items())
    ]
    output.table(("device", "rights", "certificate until", "revoked on"), rows)
    output.say(f"federation {registry.federation}, broker at {', '.join(registry.hosts)}")
    output.say(f"broker's certificate until {registry.server_expires[:10]}; run key {key}")
    devices = [
        {"device": name, "admitted": not entry.revoked, "expires": entry.expires, "revoked": entry.revoked}
        for name, entry in sorted(registry.devices.items())
    ]
    output.result({"federation": registry.federation, "devices": devices, "run_key": key, "hosts": registry.hosts})


def _open(folder: Path) -> CredentialFolder:
    from ..broker_server.security.credential_folder import CredentialFolder

    return CredentialFolder(folder)
