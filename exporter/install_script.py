"""The script in an offline bundle: POSIX shell, for the board's own Python and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Template
from typing import Final

from ..protocol.errors import ConfigError
from .board_wheels import Board

__all__ = ["check_wheel_name", "install_script"]

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.+!-]+\.whl", re.ASCII)

_TEMPLATE: Final = Template(
    r"""#!/bin/sh
# Installs fedzo-device from this folder into a virtual environment, without a network, and checks the machine:
#     sh install.sh [FOLDER]     by default ./fedzo; a new or empty folder, or an installation to bring up to date
#   PYTHON  the interpreter of a new installation, by default python$python
# Ends with 3 if this folder or this machine is not the right one, with 7 if a check of fedzo-device doctor fails.
set -eu

fail() { printf 'error: %s\nhint: %s\n' "$$1" "$$2" >&2; exit 3; }

here=$$(CDPATH='' cd -- "$$(dirname -- "$$0")" && pwd)
folder=$${1:-fedzo}
case $$folder in /*) ;; *) folder=$$PWD/$$folder ;; esac
python=$${PYTHON:-python$python}
# Nothing but this folder counts: so pip runs with --isolated, which passes over its variables, and without its files.
unset PYTHONPATH PYTHONHOME || true
PIP_CONFIG_FILE=/dev/null
export PIP_CONFIG_FILE

# Nothing that was there is ever deleted: an installation keeps its interpreter, and pip replaces the packages in it.
absent= upgrade=
if [ -f "$$folder/pyvenv.cfg" ] && [ -e "$$folder/bin/fedzo-device" ]; then
    upgrade=--force-reinstall # another build of fedzo may have the same version
    python=$$folder/bin/python
elif [ ! -e "$$folder" ] && [ ! -L "$$folder" ]; then
    absent=yes
elif [ -L "$$folder" ] || [ ! -d "$$folder" ] || [ -n "$$(ls -A -- "$$folder")" ]; then
    fail "$$folder is neither empty nor an installation of fedzo-device" "give another folder: sh install.sh FOLDER"
fi

command -v "$$python" >/dev/null ||
    fail "there is no $$python" "install Python $python, name it in PYTHON, or make the bundle for another --python"
report=$$(cd -- "$$here" && sha256sum -c SHA256SUMS 2>&1) ||
    fail "this bundle is damaged: $$(printf '%s\n' "$$report" | grep -v ': OK$$' | head -n 1)" "copy it again"
found=$$("$$python" -c 'import platform, struct, sys
bits = 8 * struct.calcsize("P")
machine = platform.machine()  # of the kernel, which may have more bits than the programs
print("%d.%d" % sys.version_info[:2], "armv7l" if bits == 32 and machine in ("aarch64", "armv8l") else machine)')
[ "$$found" = "$python $machine" ] ||
    fail "this is Python $${found% *} on $${found#* }, the bundle is for $python on $machine" \
        "make one for it$${upgrade:+, or give another folder: sh install.sh FOLDER}"
$system_check
# What a new installation wrote goes again if it cannot be completed; the folder was empty.
undo() {
    rm -rf -- "$$folder"/* "$$folder"/.[!.]* 2>/dev/null || true
    [ -z "$$absent" ] || rmdir -- "$$folder" 2>/dev/null || true
}
if [ -z "$$upgrade" ]; then
    trap undo EXIT
    trap 'exit 1' HUP INT TERM
    # Without ensurepip, which Debian keeps in a package of its own: pip is one of the wheels.
    "$$python" -m venv --without-pip$site_packages "$$folder" ||
        fail "$$python cannot make a virtual environment" "on Debian and Ubuntu: apt install python3-venv"
fi
cd -- "$$here/wheels"
"$$folder/bin/python" $pip/pip --isolated install --quiet --no-index --no-deps --disable-pip-version-check $$upgrade \
$wheels ||
    fail "pip cannot install the wheels in $$folder" "mend what the lines above say, and run this again"
trap - EXIT HUP INT TERM
printf 'installed in %s\n' "$$folder"
cd -- "$$here"
"$$folder/bin/python" -m fedzo.edge_runtime doctor$artifact || {
    code=$$?
    printf 'error: this machine does not pass every check\nhint: the lines with FAIL say why\n' >&2
    exit "$$code"
}
printf 'next: %s/bin/fedzo-device join mqtts://BROKER --data FILE\n' "$$folder"
"""
)
_SYSTEM_CHECK: Final = Template(
    r""""$$python" -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in "$names".split()))' ||
    fail "$listed must come from this system" "apt install $packages"
"""
)


def check_wheel_name(name: str) -> None:
    """Refuse a file name that is not safe to write into the script.

    Raises:
        ConfigError: It holds another character than those of names and versions, or starts like an option.
    """
    if not _PLAIN_NAME.fullmatch(name) or name.startswith("-"):
        raise ConfigError(
            f"the wheel {name[:80]!r} has a name that a shell might misread",
            hint="letters, digits and _ . + ! - only, such as fedzo-0.1.0-py3-none-any.whl",
        )


def install_script(board: Board, wheels: Sequence[str], *, artifact: bool, system_packages: Sequence[str]) -> str:
    """The text of ``install.sh``.

    Args:
        board: What it may be installed on.
        wheels: File names in the folder ``wheels``; one of them is pip's.
        artifact: There is a folder ``artifact`` to check.
        system_packages: Modules that the system must have.

    Raises:
        ConfigError: The name of a wheel holds what a shell might not read as a name.
    """
    for name in wheels:
        check_wheel_name(name)
    check = ""
    if system_packages:
        check = _SYSTEM_CHECK.substitute(
            names=" ".join(system_packages),
            listed=" and ".join(system_packages),
            packages=" ".join(f"python3-{name}" for name in system_packages),
        )
    return _TEMPLATE.substitute(
        python=board.python,
        machine=board.machine,
        system_check=check,
        site_packages=" --system-site-packages" if system_packages else "",
        pip=next(name for name in wheels if name.startswith("pip-")),
        wheels=" \\\n".join(f"    {name}" for name in wheels),
        artifact=" --artifact artifact" if artifact else "",
    )
