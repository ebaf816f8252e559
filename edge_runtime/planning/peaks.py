"""The peak of each kind of resident memory of this process, taken by a child process that watches it.

The kernel keeps one peak, ``VmHWM``, of everything together. What a plan can state for any machine is the anonymous
part: the code of libraries that is resident beside it depends on the kernel and on its page cache.
"""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Peaks", "Watch"]

_INTERVAL_S: Final = 0.0005
_ANSWER: Final = struct.Struct("<qq")
_BUFFER_BYTES: Final = 8192


@dataclass(frozen=True, slots=True)
class Peaks:
    """What was seen at most, each at its own time.

    Attributes:
        anonymous_mib: Heap, stacks, and library data that were written.
        file_mib: Pages of files: code, constants, mapped data.
    """

    anonymous_mib: float
    file_mib: float


class Watch:
    """Watches this process from its making on; a context that ends the watching child.

    Make it before there are threads and before anything large is imported, since it forks. A peak that lasts less than
    half a millisecond may be missed.
    """

    def __init__(self) -> None:
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        watched = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._ask)
            os.close(self._answers)
            try:
                _watch(watched, asked, answered)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answered)

    def restart(self) -> Peaks:
        """The peaks since the last call; the next ones start from now.

        Raises:
            OSError: The child has ended.
        """
        os.write(self._ask, b"?")
        answer = os.read(self._answers, _ANSWER.size)
        if len(answer) != _ANSWER.size:
            raise OSError("the process that watches the memory has ended")
        anonymous_kib, file_kib = _ANSWER.unpack(answer)
        return Peaks(anonymous_kib / 1024, file_kib / 1024)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ask)
        os.close(self._answers)
        os.waitpid(self._child, 0)


def _watch(process: int, asked: int, answered: int) -> None:
    status = os.open(f"/proc/{process}/status", os.O_RDONLY)
    anonymous = file = 0
    while True:
        text = os.pread(status, _BUFFER_BYTES, 0)
        now = _field(text, b"RssAnon:"), _field(text, b"RssFile:")
        anonymous, file = max(anonymous, now[0]), max(file, now[1])
        if select.select([asked], [], [], _INTERVAL_S)[0]:
            if not os.read(asked, 1):
                return
            os.write(answered, _ANSWER.pack(anonymous, file))
            anonymous, file = 0, 0


def _field(text: bytes, name: bytes) -> int:
    _, _, rest = text.partition(name)
    return int(rest.split(None, 1)[0]) if rest else 0
