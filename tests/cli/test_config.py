"""Settings: which source wins, where a value came from, and what a wrong one is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.cli.config import ConfigFile, Origin, find_file, resolve
from fedzo.protocol.errors import ConfigError


@dataclass(frozen=True)
class Broker:
    port: int = 1883
    host: str = "localhost"
    password: str = field(default="", metadata={"secret": True})

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"broker port is {self.port}, it must be 1 to 65535")


@dataclass(frozen=True)
class Settings:
    rounds: int = 500
    sigma: float = 1e-3
    two_sided: bool = False
    family: Literal["hadamard", "gaussian"] = "hadamard"
    data: Path | None = None
    seeds: tuple[int, ...] = (0,)
    broker: Broker = field(default_factory=Broker)


@dataclass(frozen=True)
class Required:
    name: str


def file(folder: Path, text: str) -> ConfigFile:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return ConfigFile.load(path)


def resolved(**sources: Any) -> Settings:
    return resolve(Settings, **{"environ": {}, **sources}).settings


@given(st.dictionaries(st.sampled_from(["flag", "environment", "file", "profile"]), st.integers(0, 10**6)))
def test_the_first_source_that_has_a_value_wins(given_by: dict[str, int]) -> None:
    ranking = ("flag", "environment", "file", "profile")
    text = f"[broker]\nhost = 'b'\n\n# rounds = 7\n[top]\n{'rounds' if 'file' in given_by else 'seeds'} = [0]"
    data = {"rounds": given_by["file"]} if "file" in given_by else {}
    found = resolve(
        Settings,
        flags={"rounds": given_by.get("flag"), "broker.port": None},
        environ={"FEDZO_ROUNDS": str(given_by["environment"])} if "environment" in given_by else {},
        file=ConfigFile(Path("run.toml"), text, data),
        profile={"rounds": given_by.get("profile"), "cores": 4},
        profile_name="rpi-zero-2w",
    )
    winner = next((source for source in ranking if source in given_by), "default")
    assert found.origins["rounds"].kind == winner
    assert found.settings.rounds == given_by.get(winner, 500)
    assert found.origins["broker.port"] == Origin("default")


def test_every_value_has_its_origin(tmp_path: Path) -> None:
    settings = file(tmp_path, "rounds = 3\n\n[broker]\nhost = 'example'  # here\n")
    found = resolve(
        Settings,
        flags={"two_sided": True},
        environ={"FEDZO_BROKER_PASSWORD": "hunter2", "FEDZO_SEEDS": "1, 2", "FEDZO_SIGMA": ""},
        file=settings,
        profile={"family": "gaussian"},
        profile_name="jetson-nano",
    )
    assert found.settings.seeds == (1, 2)
    assert found.settings.broker.password == "hunter2"
    assert {name: (value, str(origin)) for name, value, origin in found.rows()} == {
        "rounds": (3, f"file {settings.path}:1"),
        "sigma": (1e-3, "default"),
        "two_sided": (True, "flag"),
        "family": ("gaussian", "profile jetson-nano"),
        "data": (None, "default"),
        "seeds": ((1, 2), "environment FEDZO_SEEDS"),
        "broker.port": (1883, "default"),
        "broker.host": ("example", f"file {settings.path}:4"),
        "broker.password": ("********", "environment FEDZO_BROKER_PASSWORD"),
    }


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("two_sided = true", Settings(two_sided=True)),
        ("sigma = 1", Settings(sigma=1.0)),
        ("seeds = [3, 4]", Settings(seeds=(3, 4))),
        ("broker.port = 8883", Settings(broker=Broker(port=8883))),
        ("broker = {port = 8883}", Settings(broker=Broker(port=8883))),
        ("", Settings()),
    ],
)
def test_files_are_read(tmp_path: Path, text: str, want: Settings) -> None:
    assert resolved(file=file(tmp_path, text)) == want


def test_paths_in_a_file_start_from_its_folder(tmp_path: Path) -> None:
    assert resolved(file=file(tmp_path, "data = 'train.npz'")).data == tmp_path / "train.npz"
    assert resolved(file=file(tmp_path, "data = '/data/train.npz'")).data == Path("/data/train.npz")
    assert resolved(environ={"FEDZO_DATA": "train.npz"}).data == Path("train.npz")


@pytest.mark.parametrize(
    ("variable", "text", "want"),
    [
        ("FEDZO_TWO_SIDED", "yes", Settings(two_sided=True)),
        ("FEDZO_TWO_SIDED", "0", Settings(two_sided=False)),
        ("FEDZO_SIGMA", "1e-2", Settings(sigma=1e-2)),
        ("FEDZO_FAMILY", "gaussian", Settings(family="gaussian")),
        ("FEDZO_SEEDS", "5", Settings(seeds=(5,))),
    ],
)
def test_the_environment_is_read_as_the_settings_type(variable: str, text: str, want: Settings) -> None:
    assert resolved(environ={variable: text}) == want


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("rounds = 3\nround = 4", r"run\.toml:2: unknown setting round$", "did you mean rounds?"),
        ("[broker]\nhots = 'a'", r"run\.toml:2: unknown setting broker\.hots$", "did you mean host?"),
        ("[zzz]\na = 1", r"run\.toml:1: unknown setting zzz$", "known here: broker, data, family"),
        ("\nrounds = '3'", r"run\.toml:2: rounds = '3' is not a whole number$", ""),
        ("rounds = true", r"run\.toml:1: rounds = True is not a whole number$", ""),
        ("two_sided = 1", r"run\.toml:1: two_sided = 1 is not true or false$", ""),
        ("sigma = 'x'", r"run\.toml:1: sigma = 'x' is not a number$", ""),
        ("family = 'fourier'", r"run\.toml:1: family = 'fourier' is not one of hadamard, gaussian$", ""),
        ("seeds = 3", r"run\.toml:1: seeds = 3 is not a list$", ""),
        ("seeds = [1, 'b']", r"run\.toml:1: seeds = \[1, 'b'\] is not a whole number$", ""),
        ("broker = 3", r"run\.toml:1: broker is a table, not 3$", ""),
        ("[broker]\nport = 0", r"^broker port is 0, it must be 1 to 65535$", "set: broker.port from file"),
        ("\nrounds = ?", r"run\.toml:2: not a TOML file", "toml.io"),
    ],
)
def test_a_wrong_file_is_told_where_and_what(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(file=file(tmp_path, text))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("FEDZO_ROUNDS", "many", "FEDZO_ROUNDS: rounds = 'many' is not a whole number"),
        ("FEDZO_TWO_SIDED", "maybe", r"FEDZO_TWO_SIDED: two_sided = 'maybe' is not a truth value \(true or false\)"),
        ("FEDZO_SEEDS", "1,b", "FEDZO_SEEDS: seeds = '1,b' is not a whole number"),
        ("FEDZO_FAMILY", "fourier", "FEDZO_FAMILY: family = 'fourier' is not one of hadamard, gaussian"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolved(environ={variable: text})


def test_a_wrong_secret_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"broker\.password = \*{8} is not a text") as caught:
        resolved(file=file(tmp_path, "[broker]\npassword = 1234"))
    assert "1234" not in str(caught.value)


def test_a_setting_without_a_value_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match="the setting name has no value") as caught:
        resolve(Required, environ={})
    assert "FEDZO_NAME" in caught.value.hint


def test_a_file_can_hold_tables_of_several_commands(tmp_path: Path) -> None:
    settings = file(tmp_path, "[serve]\nrounds = 3\n[serve.broker]\nport = 9\n[export]\nanything = 1\n[serv]\n")
    with pytest.raises(ConfigError, match=r":7: unknown setting serv$"):
        resolved(file=settings, table="serve", other_tables=("export",))
    settings = file(tmp_path, "[serve]\nrounds = 3\n[serve.broker]\nport = 9\n[export]\nanything = 1\n")
    found = resolve(Settings, environ={}, file=settings, table="serve", other_tables=("export",))
    assert (found.settings.rounds, found.settings.broker.port) == (3, 9)
    assert str(found.origins["broker.port"]).endswith(":4")


def test_flags_that_are_no_settings_are_a_programming_error() -> None:
    with pytest.raises(TypeError, match="Settings has no setting round"):
        resolved(flags={"round": 3})


def test_the_settings_file_is_the_named_one_or_the_folders(tmp_path: Path) -> None:
    assert find_file(None, folder=tmp_path) is None
    (tmp_path / "fedzo.toml").write_text("rounds = 1")
    other = file(tmp_path, "rounds = 2")
    found = find_file(None, folder=tmp_path)
    assert found is not None
    assert found.data == {"rounds": 1}
    assert find_file(other.path, folder=tmp_path) == other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the settings file .*: No such file or directory"),
        (b"rounds = '\xff'", "not a TOML file"),
        (b"#" * ((1 << 20) + 1), "over 1 MiB"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ConfigFile.load(path)


@given(st.binary(max_size=60))
def test_no_file_raises_anything_else(content: bytes) -> None:
    try:
        text = content.decode()
        data = {"text": text}
    except UnicodeDecodeError:
        return
    # Lines are looked for in text that any editor may have left behind.
    assert ConfigFile(Path("run.toml"), text, data).place(("rounds",)).startswith("run.toml")
