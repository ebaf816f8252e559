"""Hardware profiles: every shipped file, the search order, and every refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.hardware_profiles import list_profiles, load_profile, profile_names
from fedzo.hardware_profiles.loader import SOURCES, Profile
from fedzo.protocol.errors import ConfigError

GOOD = Path(sys.modules[Profile.__module__].__file__ or "").with_name("rpi-zero-2w.toml").read_text()
NEEDED = {
    "arduino-uno-q-2gb",
    "beaglebone-black",
    "beagleplay",
    "coral-dev-board",
    "generic-x86",
    "imx8m-mini-evk",
    "imx8m-plus-evk",
    "jetson-agx-orin-32gb",
    "jetson-nano-2gb",
    "jetson-nano-4gb",
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-8gb",
    "jetson-tx2-8gb",
    "jetson-xavier-nx",
    "orange-pi-5-8gb",
    "orange-pi-zero-3-4gb",
    "radxa-zero-3w-1gb",
    "radxa-zero-4gb",
    "rock-3a-4gb",
    "rock-5b-16gb",
    "rpi-3b-plus",
    "rpi-4b-1gb",
    "rpi-4b-4gb",
    "rpi-5-8gb",
    "rpi-zero-2w",
    "stm32mp157c-dk2",
    "stm32mp257f-dk",
}


@pytest.fixture(autouse=True)
def no_user_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FEDZO_PROFILES", raising=False)


def test_the_promised_boards_are_there() -> None:
    assert set(profile_names()) >= NEEDED
    assert len(profile_names()) >= 24
    assert [p.name for p in list_profiles()] == profile_names()


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_is_plausible_and_every_value_has_a_source(name: str) -> None:
    profile = load_profile(name)
    unsourced = {"name", "title", "machine", "system", "python", "install", "notes", "sources", "origin"}
    valued = {f for f in Profile.__dataclass_fields__ if f not in unsourced and getattr(profile, f) is not None}
    assert set(profile.sources) == valued
    assert all(text.partition(":")[0] in SOURCES for text in profile.sources.values())
    assert profile.ram_budget_mib <= profile.ram_total_mib - profile.reserve_mib
    assert 70 < profile.ram_budget_mib <= 2048
    assert (profile.memcpy_mb_s is None) == (profile.memset_mb_s is None)
    assert (profile.machine == "armv7l") == ("armv7-a" in profile.isa) == ("apt install" in profile.install)


def test_values_of_one_board() -> None:
    profile = load_profile("rpi-zero-2w")
    assert (profile.cores, profile.clock_mhz, profile.ram_total_mib, profile.memcpy_mb_s) == (4, 1000, 427, 1300)
    assert profile.source("memcpy_mb_s") == "sbc-bench"
    assert "isa" in profile.unverified
    assert "memcpy_mb_s" not in profile.unverified
    assert profile.source("nothing") == "unverified"


def test_path_and_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "config" / "fedzo" / "profiles"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for name in ["rpi-zero-2w", f"mine-{number}"]:
            text = GOOD.replace('"rpi-zero-2w"', f'"{name}"').replace("cores = 4", f"cores = {number + 5}")
            (folder / f"{name}.toml").write_text(text)
    assert load_profile("rpi-zero-2w").cores == 7
    monkeypatch.setenv("FEDZO_PROFILES", f"{folders[0]}:{folders[1]}")
    assert load_profile("rpi-zero-2w").cores == 5
    assert load_profile("rpi-zero-2w").origin == str(folders[0] / "rpi-zero-2w.toml")
    assert load_profile(folders[1] / "rpi-zero-2w.toml").cores == 6
    assert {load_profile(f"mine-{k}").cores for k in range(3)} == {5, 6, 7}
    assert set(profile_names()) > {"mine-0", "mine-1", "mine-2", "generic-x86"}


@pytest.mark.parametrize(
    ("name", "suggestion"), [("rpi-zero-2", "rpi-zero-2w"), ("RPI-5-8GB", "rpi-5-8gb"), ("orin-nano", "jetson-orin")]
)
def test_unknown_name_suggests_close_ones(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"no hardware profile '{name}'") as caught:
        load_profile(name)
    assert "did you mean" in caught.value.hint
    assert suggestion in caught.value.hint


def test_unknown_name_lists_all_when_nothing_is_close() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("zzzzz")
    assert "rpi-zero-2w" in caught.value.hint


def _set(key: str, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = text.splitlines()
        at = next(k for k, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[at] = f"{key} = {value}"
        return "\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda t: t.replace("cores = 4", "coers = 4", 1), "no field 'coers'", "did you mean cores?"),
        (lambda t: t.replace("cores = 4\n", "", 1), "cores missing", "copy a built-in"),
        (_set("cores", '"4"'), "cores is '4'", ""),
        (_set("cores", "true"), "cores is True", ""),
        (_set("cores", "0"), "from 1 to 1024", ""),
        (_set("clock_mhz", "1.5"), "clock_mhz is 1.5", ""),
        (_set("ram_total_mib", "-1"), "ram_total_mib is -1", ""),
        (_set("ram_budget_mib", "400"), "leaves 329", "164 or less"),
        (_set("reserve_mib", "427"), "leaves 0", ""),
        (_set("page_size", "5000"), "power of two", ""),
        (_set("threads", "8"), "has 4 cores", ""),
        (_set("isa", '"neon"'), "list of texts", ""),
        (_set("isa", "[]"), "list of texts", ""),
        (_set("isa", "[1]"), "list of texts", ""),
        (_set("title", "3"), "title must be a text", ""),
        (_set("machine", '"arm64"'), "machine is 'arm64'", ""),
        (_set("name", '"other"'), "must be that of the file", "rename the file"),
        (_set("memcpy_mb_s", "0"), "memcpy_mb_s is 0", ""),
        (lambda t: t.replace('[sources]\nsoc = "vendor"', '[sources]\nsoc = "somebody"'), "source of soc", "sbc-bench"),
        (lambda t: t.replace("[sources]\nsoc = ", "[sources]\nsco = "), "names the field 'sco'", "soc"),
        (lambda t: t.partition("[sources]")[0] + "\nsources = 3\n", "sources must be a table", ""),
        (lambda t: "a = = b", "no TOML", ""),
        (lambda t: t + "#" * 70_000, "longer than", ""),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path: Path, change: Callable[[str], str], message: str, hint: str) -> None:
    path = tmp_path / "rpi-zero-2w.toml"
    path.write_text(change(GOOD))
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(path)
    assert str(path) in caught.value.message
    assert hint in caught.value.hint


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no TOML"):
        load_profile(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match="no profile file"):
        load_profile(tmp_path / "b.toml")
    (tmp_path / "c.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "c.toml")


def test_sources_may_be_left_out_by_users(tmp_path: Path) -> None:
    path = tmp_path / "rpi-zero-2w.toml"
    path.write_text(GOOD.partition("[sources]")[0])
    assert load_profile(path).source("cores") == "unverified"
    assert "cores" in load_profile(path).unverified
