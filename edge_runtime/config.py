"""Settings of a command: flag, then environment, then TOML file, then hardware profile, then default.

A command describes its settings as a frozen dataclass; nested dataclasses are tables of the TOML file. `resolve` fills
one from all sources and remembers where each value came from, which is what ``--show-config`` prints. ::

    @dataclass(frozen=True)
    class Broker:
        port: int = 1883

    @dataclass(frozen=True)
    class Serve:
        rounds: int = 500
        broker: Broker = field(default_factory=Broker)

    resolved = resolve(Serve, flags={"rounds": rounds}, file=find_file(config))
    resolved.settings.broker.port       # FEDZO_BROKER_PORT, [broker] port, the profile's or 1883

A field whose metadata says ``secret`` is masked wherever settings are shown.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

from ..protocol.errors import ConfigError
from .config_values import from_text, from_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ConfigFile", "Origin", "Resolved", "default_values", "find_file", "resolve", "unknown_variables"]

DEFAULT_FILE: Final = "fedzo.toml"
MAX_FILE_BYTES: Final = 1 << 20
SECRET: Final = "********"  # noqa: S105 - what is shown in place of one
_UNSET: Final = object()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: The layer.
        name: What to change to change the value: ``FEDZO_ROUNDS``, ``run.toml:3``, a profile's name; empty for a flag,
            which the user has before their eyes, and for a default.
    """

    kind: Literal["flag", "environment", "file", "profile", "default"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A TOML file as read.

    Attributes:
        path: Where it lies; relative paths inside it start from its folder.
        text: Its text, kept to find the line of a key.
        data: Its content.
    """

    path: Path
    text: str
    data: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> ConfigFile:
        """Reads a file.

        Raises:
            ConfigError: It cannot be read, is over 1 MiB, or is not TOML.
        """
        try:
            with path.open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"cannot read the settings file {path}: {error.strerror or error}",
                hint="name a TOML file, or leave --config away",
            ) from error
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is over {MAX_FILE_BYTES >> 20} MiB, too large for a settings file")
        try:
            text = content.decode("utf-8")
            return cls(path, text, tomllib.loads(text))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            line = re.search(r"at line (\d+)", str(error))
            place = f"{path}:{line[1]}" if line else str(path)
            raise ConfigError(f"{place}: not a TOML file: {error}", hint="the format: https://toml.io") from error

    def place(self, key: tuple[str, ...]) -> str:
        """``run.toml:3``, the line that sets a key, or only the path where the text hides it (inline tables)."""
        table: tuple[str, ...] = ()
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]", line):
                table = _split_key(header[1])
                if table == key:
                    return f"{self.path}:{number}"
            elif (assignment := re.match(r"\s*([^=#]+?)\s*=", line)) and (*table, *_split_key(assignment[1])) == key:
                return f"{self.path}:{number}"
        return str(self.path)


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def find_file(path: Path | None, *, folder: Path | None = None) -> ConfigFile | None:
    """The settings file of a command: the one named, else ``fedzo.toml`` in the folder, else none.

    Args:
        path: What ``--config`` or ``FEDZO_CONFIG`` names.
        folder: Where to look for ``fedzo.toml``; the current folder by default.

    Raises:
        ConfigError: The named file cannot be used, or one that was found is not TOML.
    """
    if path is not None:
        return ConfigFile.load(path)
    found = (folder or Path()) / DEFAULT_FILE
    return ConfigFile.load(found) if found.is_file() else None


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """Settings with their origins.

    Attributes:
        settings: The filled dataclass.
        origins: Origin of each leaf, by dotted name (``broker.port``), in the order of the fields.
    """

    settings: T
    origins: Mapping[str, Origin]

    def rows(self) -> Iterator[tuple[str, Any, Origin]]:
        """(name, value, origin) of every setting, secrets masked."""
        for leaf in _leaves(type(self.settings)):
            value: Any = self.settings
            for part in leaf.key:
                value = getattr(value, part)
            yield leaf.name, SECRET if leaf.secret and value else value, self.origins[leaf.name]


def resolve(
    cls: type[T],
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: ConfigFile | None = None,
    table: str | None = None,
    other_tables: Collection[str] = (),
    profile: Mapping[str, Any] | None = None,
    profile_name: str = "",
    options: Mapping[str, str] | None = None,
) -> Resolved[T]:
    """Fills a dataclass of settings from every source.

    Args:
        cls: The dataclass. Leaves are ``bool``, ``int``, ``float``, ``str``, ``Path``, ``Literal``, ``tuple[X, ...]``
            of these, or such a type or ``None``; dataclass fields are nested tables.
        flags: Command-line values by dotted name; ``None`` is a flag that was not given.
        environ: ``os.environ`` by default. ``broker.port`` is read from ``FEDZO_BROKER_PORT``; tuples are split at
            commas; an empty variable counts as unset.
        file: What `find_file` gave.
        table: The top-level table of the file that holds these settings; ``None`` for the whole file.
        other_tables: Top-level tables that belong to other commands and are left alone.
        profile: The hardware profile's values by dotted name; names that are no setting of ``cls`` are left out.
        profile_name: For the origin.
        options: What options are called where it is not ``--`` and the last part of the dotted name, for messages.

    Raises:
        ConfigError: An unknown key in the file, a value of the wrong type, a missing value, or one that the dataclass
            itself refuses.
    """
    environ = os.environ if environ is None else environ
    leaves = list(_leaves(cls))
    names = {leaf.name for leaf in leaves}
    if unknown := set(flags or ()) - names:
        raise TypeError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")
    from_file = {} if file is None else dict(_file_values(file, leaves, table, other_tables))

    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for leaf in leaves:
        name = leaf.name
        variable = _variable(leaf.key)
        folder = Path()
        raw: Any
        if flags is not None and flags.get(name) is not None:
            raw, origin = flags[name], Origin("flag")
        elif environ.get(variable):
            raw, origin = environ[variable], Origin("environment", variable)
        elif file is not None and name in from_file:
            raw, origin, folder = (
                from_file[name],
                Origin("file", file.place(_in_table(table, leaf.key))),
                file.path.parent,
            )
        elif profile is not None and profile.get(name) is not None:
            raw, origin = profile[name], Origin("profile", profile_name)
        elif leaf.default is not _UNSET:
            values[name], origins[name] = leaf.default, Origin("default")
            continue
        else:
            raise ConfigError(
                f"the setting {name} has no value",
                hint=f"give its flag, set {variable}, or write {name} into a settings file",
            )
        convert = from_text if origin.kind == "environment" else from_value
        try:
            values[name] = convert(leaf.annotation, raw, folder)
        except ValueError as error:
            shown = SECRET if leaf.secret else repr(raw)
            raise ConfigError(
                f"{_place(name, origin, options or {})}: {name} = {shown} is not {error}",
                hint="--show-config lists every setting with its value",
            ) from error
        origins[name] = origin
    return Resolved(_build(cls, (), values, origins, options or {}), origins)


def default_values(cls: type[Any]) -> dict[str, Any]:
    """The default of every setting that has one, by dotted name."""
    return {leaf.name: leaf.default for leaf in _leaves(cls) if leaf.default is not _UNSET}


def unknown_variables(cls: type[Any], environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like a setting in one of the tables of ``cls`` and are none, each with what was meant.

    Args:
        cls: The dataclass.
        environ: ``os.environ`` by default.
    """
    known = {_variable(leaf.key) for leaf in _leaves(cls)}
    tables = tuple({_variable(leaf.key[:1]) + "_" for leaf in _leaves(cls) if len(leaf.key) > 1})
    found = []
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if value and name.startswith(tables) and name not in known:
            match = get_close_matches(name, known, n=1)
            meant = f"did you mean {match[0]}?" if match else "--show-config lists every setting"
            found.append(f"the variable {name} is no setting: {meant}")
    return found


def _variable(key: tuple[str, ...]) -> str:
    return "FEDZO_" + "_".join(key).upper()


@dataclass(frozen=True, slots=True)
class _Leaf:
    key: tuple[str, ...]
    annotation: Any
    default: Any
    secret: bool

    @property
    def name(self) -> str:
        return ".".join(self.key)


def _leaves(cls: type[Any], prefix: tuple[str, ...] = (), defaults: Any = _UNSET) -> Iterator[_Leaf]:
    """Every setting of a dataclass, depth first; ``defaults`` is the instance that a parent's field defaults to."""
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        annotation, key = annotations[field.name], (*prefix, field.name)
        if defaults is not _UNSET:
            default = getattr(defaults, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = _UNSET
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from _leaves(annotation, key, default)
        else:
            yield _Leaf(key, annotation, default, bool(field.metadata.get("secret", False)))


def _build(
    cls: type[T],
    prefix: tuple[str, ...],
    values: Mapping[str, Any],
    origins: Mapping[str, Origin],
    options: Mapping[str, str],
) -> T:
    """Constructs a dataclass and the ones inside it; a refusal gets a hint that says what to change."""
    annotations = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        annotation, key = annotations[field.name], (*prefix, field.name)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            arguments[field.name] = _build(annotation, key, values, origins, options)
        else:
            arguments[field.name] = values[".".join(key)]
    try:
        return cls(**arguments)
    except (ConfigError, ValueError) as error:
        about = error.setting if isinstance(error, ConfigError) else ""
        hint = error.hint if isinstance(error, ConfigError) else ""
        name = ".".join([*prefix, about])
        if name in origins:
            hint = hint or f"change {_place(name, origins[name], options)}"
        start = "".join(f"{part}." for part in prefix)
        given = [f"{name} from {origin}" for name, origin in origins.items() if name.startswith(start)]
        given = [text for text in given if not text.endswith("from default")]
        raise ConfigError(str(error), hint=hint or ("set: " + ", ".join(given) if given else "")) from error


def _place(name: str, origin: Origin, options: Mapping[str, str]) -> str:
    """What a person changes to change a setting."""
    if origin.kind in ("flag", "default"):
        return options.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))
    return f"{name} in {origin.name}" if origin.kind == "file" else origin.name


def _in_table(table: str | None, key: tuple[str, ...]) -> tuple[str, ...]:
    return key if table is None else (table, *key)


def _file_values(
    file: ConfigFile, leaves: Collection[_Leaf], table: str | None, other_tables: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """Dotted names and raw values of the file; every key must be known."""
    known = {_in_table(table, leaf.key) for leaf in leaves}
    tables = {key[:depth] for key in known for depth in range(1, len(key))}

    def walk(content: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for part, value in content.items():
            key = (*prefix, part)
            if key in known:
                yield ".".join(key if table is None else key[1:]), value
            elif key in tables:
                if not isinstance(value, dict):
                    name = ".".join(key)
                    raise ConfigError(
                        f"{file.place(key)}: {name} is a table, not {value!r}",
                        hint=f"write [{name}], and its settings on lines of their own",
                    )
                yield from walk(value, key)
            elif prefix or part not in other_tables:
                near = [candidate[-1] for candidate in known | tables if candidate[:-1] == prefix]
                match = get_close_matches(part, near, n=1)
                hint = f"did you mean {match[0]}?" if match else f"known here: {', '.join(sorted(near))}"
                raise ConfigError(f"{file.place(key)}: unknown setting {'.'.join(key)}", hint=hint)

    yield from walk(file.data, ())
