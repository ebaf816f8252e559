"""An offline bundle: a folder with the wheels of a board, an artifact, their hashes and a script that installs them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from ..protocol.errors import ConfigError
from .board_wheels import SYSTEM_PACKAGES, Board, fetch_wheels
from .folder_replacement import flush_folder, replace_folder
from .install_script import check_wheel_name, install_script
from .own_wheel import write_own_wheel

__all__ = ["Bundle", "make_bundle"]

DESCRIPTION: Final = "bundle.json"
SUMS: Final = "SHA256SUMS"
SCRIPT: Final = "install.sh"
_ALWAYS: Final = {DESCRIPTION, SUMS, SCRIPT}
_PARTS: Final = _ALWAYS | {"wheels", "artifact"}


@dataclass(frozen=True)
class Bundle:
    """What was made.

    Attributes:
        folder: Where it lies.
        wheels: File names of the wheels.
        size: Of all files, in bytes.
    """

    folder: Path
    wheels: tuple[str, ...]
    size: int


def make_bundle(
    board: Board,
    out: Path,
    *,
    artifact: Path | None = None,
    wheel: Path | None = None,
    system_packages: bool = False,
    overwrite: bool = False,
) -> Bundle:
    """Make a bundle. The folder appears at once and complete, or not at all.

    Args:
        board: Where it is to be installed.
        out: Folder to make.
        artifact: Folder of `fedzo export`, for the check at the end of the installation.
        wheel: Of fedzo; by default one is made of the fedzo that runs.
        system_packages: The board takes numpy and onnxruntime from its distribution.
        overwrite: Replace ``out`` when it is a bundle or empty; any other folder is never touched.

    Raises:
        ConfigError: The folder is in the way or cannot be written, or a wheel cannot be had.
        ArtifactError: ``artifact`` is none.
    """
    if board.machine == "armv7l" and not system_packages:
        raise ConfigError(
            "there is no wheel of onnxruntime for 32-bit Arm, neither of numpy",
            hint="Debian 13 has both: apt install python3-onnxruntime python3-numpy on the board, and make the bundle "
            "with --system-packages",
        )
    _check_target(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".new", dir=out.parent))
        try:
            fresh.chmod(0o755)
            bundle = _fill(fresh, board, artifact, wheel, system_packages)
            flush_folder(fresh, files=True)
            _check_target(out, overwrite)
            replace_folder(fresh, out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"the bundle cannot be written to {out}: {error.strerror or error}") from error
    return Bundle(out, bundle.wheels, bundle.size)


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a bundle to be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out} exists and is no folder", hint="choose another --out")
    try:
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise ConfigError(f"the folder {out} cannot be read: {error.strerror or error}") from error
    if names and not names >= _ALWAYS:
        raise ConfigError(f"{out} exists and is no bundle", hint="choose another --out")
    if names - _PARTS:
        raise ConfigError(
            f"{out} holds {min(names - _PARTS)!r}, which is no part of a bundle", hint="choose another --out"
        )
    if not overwrite:
        raise ConfigError(f"the folder {out} exists", hint="give --overwrite to replace the bundle in it")


def _fill(folder: Path, board: Board, artifact: Path | None, wheel: Path | None, system_packages: bool) -> Bundle:
    (folder / "wheels").mkdir()
    own = _own_wheel(folder / "wheels", wheel)
    without = SYSTEM_PACKAGES if system_packages else frozenset()
    wheels = tuple(path.name for path in fetch_wheels(board, own, folder / "wheels", without=without))
    model = None if artifact is None else _copy_artifact(artifact, folder / "artifact")
    script = folder / SCRIPT
    script.write_text(
        install_script(board, wheels, artifact=artifact is not None, system_packages=sorted(without)), encoding="utf-8"
    )
    script.chmod(0o755)
    description: dict[str, Any] = {
        "fedzo": str(parse_wheel_filename(own.name)[1]),
        "machine": board.machine,
        "python": board.python,
        "glibc": f"2.{board.glibc}",
        "system_packages": sorted(without),
        "model": model,
        "wheels": list(wheels),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    return Bundle(folder, wheels, sum(path.stat().st_size for path in files))


def _own_wheel(folder: Path, wheel: Path | None) -> Path:
    if wheel is None:
        return write_own_wheel(folder)
    try:
        if parse_wheel_filename(wheel.name)[0] != "fedzo":
            raise ConfigError(f"{wheel} is no wheel of fedzo")
        check_wheel_name(wheel.name)
        return Path(shutil.copy(wheel, folder))
    except InvalidWheelFilename:
        raise ConfigError(f"{wheel} is no wheel", hint="such as fedzo-0.1.0-py3-none-any.whl") from None
    except OSError as error:
        raise ConfigError(f"{wheel} cannot be read: {error.strerror or error}") from error


def _copy_artifact(source: Path, to: Path) -> str:
    from .artifact import MANIFEST, verify_artifact  # needs onnx, the rest does not

    manifest = verify_artifact(source)
    to.mkdir()
    names = [graph.name for graph in (*manifest.graphs, *(variant.file for variant in manifest.variants))]
    for name in (MANIFEST, *names):
        shutil.copyfile(source / name, to / name)
    return manifest.model
