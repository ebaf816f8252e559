"""Entry point of ``fedzo-device``: the command line of a board.

Only the standard library is imported until a command runs, so that help is instant on a slow board and the
environment can still be set for the libraries that read it once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..protocol.errors import FedzoError
from .logs import CONTROL, FILE_BYTES, FILES, Logs
from .usage import Parser

if TYPE_CHECKING:
    from .agent import Summary
    from .config import Resolved
    from .join import JoinSettings

__all__ = ["main"]

_log = logging.getLogger("fedzo.edge_runtime")  # under -m the module's name is __main__

EXIT_UNEXPECTED: Final = 1
EXIT_INTERRUPTED: Final = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0, a :class:`FedzoError`'s own, 130 after Ctrl-C, 1 for anything unexpected. Wrong usage
        raises ``SystemExit`` with 2.
    """
    parser = _parser()
    options = parser.parse(arguments)
    if options.version:
        return _version(options)
    if options.command is None:
        parser.error("give a command: join, doctor, install or profiles")
    result: dict[str, Any] = {}
    options.logs = Logs(level="debug" if options.verbose else None)
    try:
        code = _guarded(options, result)
    finally:
        options.logs.close()
    if options.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, sort_keys=True), flush=True)
    return code


def _guarded(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Run the command; an exception becomes lines on stderr, a key of ``result`` and an exit code."""
    try:
        return int(options.run(options, result))
    except KeyboardInterrupt:
        return _failed(options, result, "interrupted", exit_code=EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except FedzoError as error:
        _log.debug("the error came from here", exc_info=True)
        return _failed(
            options, result, error.message, hint=error.hint, kind=type(error).__name__, exit_code=error.exit_code
        )
    except Exception as error:  # noqa: BLE001 (the last resort of a program)
        _log.debug("the error came from here", exc_info=True)
        hint = "" if options.verbose else "--verbose shows the traceback"
        return _failed(
            options, result, f"unexpected {type(error).__name__}: {error}", hint=hint, kind=type(error).__name__
        )


def _failed(
    options: argparse.Namespace,
    result: dict[str, Any],
    message: str,
    *,
    hint: str = "",
    kind: str = "",
    exit_code: int = EXIT_UNEXPECTED,
) -> int:
    options.logs.say(f"error: {message}", level="error")
    if hint:
        options.logs.say(f"hint: {hint}")
    result["error"] = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}
    return exit_code


# --- commands -------------------------------------------------------------------------------------------------------


def _version(options: argparse.Namespace) -> int:
    from .installation.versions import installed_versions

    versions = installed_versions()
    print(json.dumps(versions) if options.json else "\n".join(f"{name} {text}" for name, text in versions.items()))
    return 0


def _profiles(options: argparse.Namespace, result: dict[str, Any]) -> int:
    from ..hardware_profiles.loader import list_profiles, load_profile

    if options.name is not None:
        profile = load_profile(options.name)
        result.update({name: value for name, value in dataclasses.asdict(profile).items() if value is not None})
        lines = [
            f"{name}\t{', '.join(value) if isinstance(value, tuple) else value}\t{profile.sources.get(name, '')}"
            for name, value in result.items()
            if name != "sources"
        ]
    else:
        profiles = list_profiles()
        result["profiles"] = [
            {"name": p.name, "title": p.title, "ram_budget_mib": p.ram_budget_mib, "threads": p.threads}
            for p in profiles
        ]
        lines = [f"{p.name}\t{p.ram_budget_mib} MiB\t{p.threads} threads\t{p.title}" for p in profiles]
    if not options.json:
        print("\n".join(lines))
    return 0


def _join(options: argparse.Namespace, result: dict[str, Any]) -> int:
    from .connection.light_imports import hashlib_without_openssl
    from .planning.resident import keep_small, release_code, trim_heap

    keep_small()
    hashlib_without_openssl()
    from .join import Stopped, join

    resolved = _settings(options)
    if options.show_config:
        _show(resolved, options, result)
        return 0

    settings = resolved.settings
    options.logs.close()
    options.logs = Logs(settings.log_format, settings.log_file, "debug" if options.verbose else None)
    release_code()
    trim_heap()

    def done(summary: Summary) -> None:
        result.update({name: _finite(value) for name, value in dataclasses.asdict(summary).items()})

    try:
        join(settings, say=options.logs.say, done=done, context=options.logs.context)
    except Stopped:
        return EXIT_INTERRUPTED
    options.logs.say(f"{result['status']}: {result['log_length']} updates, {result['reports']} reports")
    return 0


def _doctor(options: argparse.Namespace, result: dict[str, Any]) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .installation.doctor import Check, DoctorSettings, diagnose, verdict

    names = [field.name for field in dataclasses.fields(DoctorSettings)]
    given = {name: getattr(options, name) for name in names}
    settings = DoctorSettings(**{name: value for name, value in given.items() if value is not None})
    checks: list[Check] = []
    result["checks"] = []
    for check in diagnose(settings):
        checks.append(check)
        result["checks"].append(dataclasses.asdict(check))
        if not options.json:
            print(str(check).translate(CONTROL), flush=True)
    verdict(checks)
    return 0


def _install(options: argparse.Namespace, result: dict[str, Any]) -> int:
    from .installation.systemd import UnitSettings, install, unit_name, unit_text

    names = [field.name for field in dataclasses.fields(UnitSettings)]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    settings = UnitSettings(**given)
    if options.dry_run:
        result.update(unit=unit_name(settings), text=unit_text(settings))
        if not options.json:
            print(result["text"], end="")
        return 0
    path, notes = install(settings, overwrite=options.overwrite)
    result.update(unit=unit_name(settings), path=str(path), notes=notes)
    for note in notes:
        options.logs.say(f"warning: {note}")
    options.logs.say(f"wrote {path}; start it with: systemctl enable --now {unit_name(settings)}")
    return 0


def _settings(options: argparse.Namespace) -> Resolved[JoinSettings]:
    """All sources together; the profile's name comes out of a first pass."""
    from ..hardware_profiles.loader import load_profile
    from .config import ConfigFile, resolve
    from .join import JoinSettings

    config = options.config or os.environ.get("FEDZO_CONFIG")
    file = ConfigFile.load(Path(config)) if config else None
    names = [field.name for field in dataclasses.fields(JoinSettings)]
    flags = {name: getattr(options, name) for name in names}
    first = resolve(JoinSettings, flags=flags, file=file)
    if not first.settings.profile:
        return first
    profile = load_profile(first.settings.profile)
    values = {"ram_budget_mib": profile.ram_budget_mib, "threads": profile.threads}
    return resolve(JoinSettings, flags=flags, file=file, profile=values, profile_name=profile.name)


def _show(resolved: Resolved[JoinSettings], options: argparse.Namespace, result: dict[str, Any]) -> None:
    from .connection.endpoint import Endpoint

    for name, value, origin in resolved.rows():
        shown = str(Endpoint.parse(value)) if name == "url" else value  # without the password
        result[name] = {"value": str(shown) if isinstance(shown, Path) else shown, "origin": str(origin)}
        if not options.json:
            print(f"{name}\t{'' if shown is None else shown}\t{origin}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the parser -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="fedzo-device",
        description="Take part in a federation: prune and train a network by forward passes only.",
        epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 setting or data, 4 memory, 5 broker, 6 artifact, "
        "7 self-test, 130 interrupted.",
    )
    parser.add_argument("--version", action="store_true", help="print what is installed")
    parser.set_defaults(json=False, verbose=False)
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON line to stdout at the end")
    common.add_argument("--verbose", action="store_true", help="log everything, with tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_join(commands.add_parser("join", parents=[common], help="join a run and work until it is done"))
    _add_doctor(commands.add_parser("doctor", parents=[common], help="check this machine, one line a check"))
    _add_install(commands.add_parser("install", parents=[common], help="make a service that joins after every start"))
    profiles = commands.add_parser("profiles", parents=[common], help="list the boards that fedzo knows")
    profiles.add_argument("name", nargs="?", metavar="NAME", help="show everything about one board")
    profiles.set_defaults(run=_profiles)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Join a run and work until it is done. Data never leave this machine. Every option can also come from the "
        "environment (FEDZO_DATA, FEDZO_RAM_BUDGET_MIB, ...) or from a TOML file; what comes first counts: option, "
        "environment, file, profile, default."
    )
    parser.set_defaults(run=_join)
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="broker: mqtt://HOST[:1883] or mqtts://HOST[:8883]")
    add("--data", type=Path, metavar="PATH", help=".npz, .npy pair, IDX files, or a folder of image folders")
    add("--profile", metavar="NAME", help="the board, see: fedzo-device profiles [default: this machine]")
    add("--ram-budget-mib", type=float, metavar="MIB", help="what this process may use [default: the profile's]")
    add("--threads", type=int, metavar="N", help="threads of a forward pass [default: the profile's, or 1]")
    add("--micro-batch", type=int, metavar="N", help="samples of one forward pass [default: what fits, 32 at most]")
    add("--holdout", type=float, metavar="PART", help="kept for evaluation, if there is no test part [default: 0.2]")
    add("--mean", type=_numbers, metavar="X[,X...]", help="subtracted from the inputs, after scaling bytes to [0, 1]")
    add("--std", type=_numbers, metavar="X[,X...]", help="what the inputs are divided by")
    add("--pad", action="store_true", default=None, help="center smaller images in zeros (28x28 in 32x32)")
    _add_providers(parser)
    _add_connection(parser)
    add("--connect-timeout", type=float, metavar="S", help="give up with exit code 5 [default: try for ever]")
    add("--retry", type=float, metavar="S", help="repeat unanswered requests after [default: 5]")
    add("--run-key", metavar="HEX", help="take runs signed with this key only [default: that of the first run]")
    _add_logs(parser)
    add("--config", type=Path, metavar="FILE", help="settings in TOML [default: FEDZO_CONFIG]")
    add("--show-config", action="store_true", help="print every setting with its origin, and stop")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check this machine, one line a check: ok, warn or FAIL. ONNX Runtime is tried in a process of its own, since "
        "some releases kill it on some boards. Ends with 7 if a check fails."
    )
    parser.set_defaults(run=_doctor)
    add = parser.add_argument
    add("--artifact", type=Path, metavar="DIR", help="folder of fedzo export: check its known answer and its memory")
    add("--profile", metavar="NAME", help="the board that this machine should be, see: fedzo-device profiles")
    _add_providers(parser)
    add("--url", metavar="URL", help="broker: check address, TLS, credentials and rights")
    _add_connection(parser)
    add("--connect-timeout", type=float, metavar="S", help="[default: 15]")


def _add_install(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a systemd unit that joins after every start of this machine, as a user without rights, with the budget "
        "as its memory limit. It is neither enabled nor started. With --verbose the service logs everything as well."
    )
    parser.set_defaults(run=_install)
    add = parser.add_argument
    add("--systemd", action="store_true", required=True, help="the only kind of service so far")
    add("--dry-run", action="store_true", help="print the unit, and change nothing")
    add("--overwrite", action="store_true", help="replace a unit that says something else")
    add("--url", required=True, metavar="URL", help="broker: mqtt://HOST[:1883] or mqtts://HOST[:8883]")
    add("--data", type=Path, required=True, metavar="PATH", help="as for join")
    add("--profile", metavar="NAME", help="the board, see: fedzo-device profiles")
    add("--ram-budget-mib", type=float, metavar="MIB", help="what the process may use [default: the profile's]")
    _add_providers(parser)
    add("--federation", metavar="NAME", help="[default: default]")
    add("--id", metavar="ID", help="device id [default: made once and kept]")
    add("--username", metavar="NAME", help="[default: the device id, if there is a password]")
    add("--password-file", type=Path, metavar="FILE", help="only root needs to be able to read it")
    add("--ca", type=Path, metavar="FILE", help="certificates that may sign the broker's [default: the system's]")
    add("--cert", type=Path, metavar="FILE", help="this device's certificate")
    add("--key", type=Path, metavar="FILE", help="its key; only root needs to be able to read it")
    add("--credentials", type=Path, metavar="DIR", help="all of these in one folder; only root needs to read it")
    add("--user", metavar="NAME", help="an existing user [default: systemd makes one while the service runs]")
    _add_logs(parser)


def _add_providers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "execution providers in order, such as cuda,cpu; may be repeated [default: cpu]"
    add("--provider", action="append", dest="providers", metavar="NAME[,NAME...]", help=text)
    text = "refuse to work when the first one does not start, instead of taking the next"
    add("--strict-providers", action="store_true", default=None, help=text)


def _add_logs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "json: one object a line, on stderr or in the file [default: text]"
    add("--log-format", choices=("text", "json"), help=text)
    add("--log-file", type=Path, metavar="FILE", help=f"at {FILE_BYTES >> 20} MiB it becomes FILE.1, {FILES} are kept")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--federation", metavar="NAME", help="[default: default]")
    add("--id", metavar="ID", help="device id, 1 to 48 of a-z 0-9 - [default: made once and kept]")
    add("--state", type=Path, metavar="DIR", help="[default: ~/.local/state/fedzo/FEDERATION/ID]")
    add("--username", metavar="NAME", help="[default: the device id, if there is a password]")
    add("--password-file", type=Path, metavar="FILE", help="its first line [default: FEDZO_PASSWORD]")
    add("--ca", type=Path, metavar="FILE", help="certificates that may sign the broker's [default: the system's]")
    add("--cert", type=Path, metavar="FILE", help="this device's certificate")
    add("--key", type=Path, metavar="FILE", help="its key")
    add("--credentials", type=Path, metavar="DIR", help="all of these in one folder, from: fedzo credentials issue")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.49,0.48,0.45") from None


if __name__ == "__main__":
    sys.exit(main())
