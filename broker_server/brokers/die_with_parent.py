"""Run a program that the kernel kills when the process that wanted it is gone: PARENT_PID USER PROGRAM [ARGUMENT...].

Run as a script between the two, because the alternative, Python code between fork and exec, is unsafe in a process
with threads (and warned about since Python 3.12). exec then replaces this interpreter, so nothing of it stays.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(arguments: list[str]) -> None:
    """Open as many files as the system allows, change the user if asked to, tie the process to its parent, become the
    program.
    """
    parent, user, *program = arguments
    # One file a device, and a shell's usual limit is 1024; what is allowed at most is for the system to say.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if user:
        # Before the prctl, which a change of user undoes. Mosquitto as root would change it later by itself.
        import pwd

        entry = pwd.getpwnam(user)
        try:
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        except OSError as error:
            sys.exit(f"cannot run as the user {user}: {error.strerror}; a user who is not root needs no such right")
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it died before the prctl
            os._exit(1)
    try:
        os.execv(program[0], program)  # noqa: S606 (no shell is wanted)
    except OSError as error:
        sys.exit(f"cannot run {program[0]}{f' as user {user}' if user else ''}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
