"""A limit of the system on this process's memory, behind the limits that the plan sets on ONNX Runtime.

``RLIMIT_DATA`` bounds the address space that is private and writable: heap, arenas, stacks, but neither code nor data
that are mapped from a file. A request over it fails in the process that made it, as ``MemoryError`` or as an error of
ONNX Runtime, before the board runs out of memory and the kernel kills something.

It must be set after the imports: libraries that meet it while they start end the process (OpenBLAS exits, ONNX Runtime
was seen to crash). It counts address space, not resident memory, so it is wider than the plan.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Final

__all__ = ["SLACK_MIB", "THREAD_MIB", "Fence"]

_log = logging.getLogger(__name__)

SLACK_MIB: Final = 32.0
"""Reserved and not used: arenas of the interpreter, gaps of the heap, buffers of a message, a thread that connects."""
THREAD_MIB: Final = 8.0
"""Address space of a thread's stack, unless the system says otherwise; a few KiB of it are used."""

_MIB: Final = 1 << 20


class Fence:
    """The limit of this process; the one that it had before comes back with :meth:`lift`."""

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None

    def set(self, growth_mib: float, *, threads: int = 1) -> float:
        """Allow what is allocated now, ``growth_mib`` more, and slack. Call it after the imports.

        Args:
            growth_mib: What the plan says beyond the process itself.
            threads: Threads within an operator; all but one are still to be made.

        Returns:
            The limit in MiB; 0.0 if the system has none or refuses it, which is logged, or had a smaller one.
        """
        self.lift()  # a limit of before was made for another plan
        now = _data_mib()
        if not sys.platform.startswith("linux") or now <= 0:
            return 0.0
        import resource  # not on every system

        limit_mib = now + growth_mib + SLACK_MIB + THREAD_MIB * (threads - 1)
        limit = math.ceil(limit_mib * _MIB)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        self._before = soft, hard
        if any(bound != resource.RLIM_INFINITY and bound <= limit for bound in (soft, hard)):
            return 0.0
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        except (OSError, ValueError) as error:
            _log.debug("no limit on the memory of this process: %s", error)
            return 0.0
        return limit_mib

    def lift(self) -> None:
        """Put the limit back that was there before :meth:`set`."""
        if self._before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (self._before[0], resource.getrlimit(resource.RLIMIT_DATA)[1]))
            self._before = None


def _data_mib() -> float:
    """``VmData`` of this process, the memory that the limit counts; 0.0 if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmData:")), 0.0)
