"""The script in an offline bundle: POSIX shell, for the board's own Python and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template
from typing import Final

from .board_wheels import Board

__all__ = ["install_script"]

_TEMPLATE: Final = Template(
    r"""#!/bin/sh
# Installs fedzo-device from this folder into a virtual environment, without a network, and checks the machine:
#     sh install.sh [FOLDER]     by default ./fedzo
#   PYTHON  the interpreter, by default python$python
# Ends with 3 if this folder or this machine is not the right one, with 7 if a check of fedzo-device doctor fails.
set -eu

fail() { printf 'error: %s\nhint: %s\n' "$$1" "$$2" >&2; exit 3; }

here=$$(CDPATH='' cd -- "$$(dirname -- "$$0")" && pwd)
folder=$${1:-fedzo}
case $$folder in /*) ;; *) folder=$$PWD/$$folder ;; esac
python=$${PYTHON:-python$python}
# Nothing but this folder counts.
unset PYTHONPATH PYTHONHOME PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS || true

command -v "$$python" >/dev/null ||
    fail "there is no $$python" "install Python $python, name it in PYTHON, or make the bundle for another --python"
report=$$(cd -- "$$here" && sha256sum -c SHA256SUMS 2>&1) ||
    fail "this bundle is damaged: $$(printf '%s\n' "$$report" | grep -v ': OK$$' | head -n 1)" "copy it again"
found=$$("$$python" -c 'import platform, struct, sys
bits = 8 * struct.calcsize("P")
print("%d.%d" % sys.version_info[:2], {"aarch64": "armv7l"}.get(platform.machine(), platform.machine()) if bits == 32
      else platform.machine())')
[ "$$found" = "$python $machine" ] ||
    fail "this is Python $${found% *} on $${found#* }, the bundle is for $python on $machine" "make one for it"
$system_check
if [ -e "$$folder" ] && [ ! -f "$$folder/pyvenv.cfg" ]; then
    fail "$$folder exists and is no virtual environment" "give another folder: sh install.sh FOLDER"
fi

# Without ensurepip, which Debian keeps in a package of its own: pip is one of the wheels.
"$$python" -m venv --clear --without-pip$site_packages "$$folder" ||
    fail "$$python cannot make a virtual environment" "on Debian and Ubuntu: apt install python3-venv"
cd -- "$$here/wheels"
"$$folder/bin/python" $pip/pip install --quiet --no-index --no-deps --disable-pip-version-check \
$wheels
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


def install_script(board: Board, wheels: Sequence[str], *, artifact: bool, system_packages: Sequence[str]) -> str:
    """The text of ``install.sh``.

    Args:
        board: What it may be installed on.
        wheels: File names in the folder ``wheels``; one of them is pip's.
        artifact: There is a folder ``artifact`` to check.
        system_packages: Modules that the system must have.
    """
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
