"""What keeps a device's resident memory small, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is Linux's")


def run(script: str, **extra: str) -> Any:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **extra}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_STATUS = """
import json, threading
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
from fedzo.edge_runtime.planning import resident
"""


def test_nothing_happens_without_being_asked() -> None:
    """A server, a test or a program that imports the engine keeps its memory as it is."""
    before, released, after = run(
        _STATUS
        + """
import numpy
before = kib("RssFile")
released = resident.release_code()
resident.trim_heap()
print(json.dumps([before, released, kib("RssFile")]))
"""
    )
    assert released == 0
    assert after >= before


def test_released_code_runs_again() -> None:
    before, mappings, after, same, again = run(
        _STATUS
        + """
resident.keep_small()
import numpy as np
square = np.arange(90_000.0).reshape(300, 300) / 1e4
first = np.linalg.slogdet(square + np.eye(300))[1], float(np.sin(square).sum())
stop = threading.Event()
busy = threading.Thread(target=lambda: [np.sin(square).sum() for _ in iter(stop.is_set, True)])
busy.start()  # another thread is in the middle of it
before = kib("RssFile")
mappings = [resident.release_code() for _ in range(20)]
after = kib("RssFile")
stop.set()
busy.join()
second = np.linalg.slogdet(square + np.eye(300))[1], float(np.sin(square).sum())
print(json.dumps([before, min(mappings), after, first == second, kib("RssFile")]))
"""
    )
    assert mappings > 5
    assert after < 0.7 * before
    assert same
    assert after <= again <= before + 1024


def test_pages_that_were_written_stay() -> None:
    """What the linker wrote into a library's data would be lost; those mappings are none of the candidates."""
    (dirty, released) = run(
        _STATUS
        + """
resident.keep_small()
import numpy, ssl
clean = resident._cleanliness()
chosen = {line for line, _, _ in resident._candidates() if clean.get(line)}
dirty, current = set(), ""
for text in open("/proc/self/smaps"):
    if resident._MAP.fullmatch(text):
        current = text.rstrip()
    elif text.startswith("Anonymous:") and text.split()[1] != "0" and current:
        dirty.add(current)
    elif "-" in text.split(":")[0] and " " in text.split(":")[0]:
        current = ""
print(json.dumps([len(dirty), len(dirty & chosen)]))
"""
    )
    assert dirty > 5
    assert released == 0


def test_the_table_of_mappings_is_never_held_at_once() -> None:
    """Its text grew with what a process has mapped, and a plan knew nothing of it."""
    table, peak = run(
        _STATUS
        + """
resident.keep_small()
import mmap, tempfile, tracemalloc, numpy
file = tempfile.TemporaryFile()
file.truncate(mmap.PAGESIZE)
kept = [mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) for _ in range(3000)]
resident.release_code()
tracemalloc.start()
resident.release_code()
_, peak = tracemalloc.get_traced_memory()
print(json.dumps([len(open("/proc/self/maps").read()), peak]))
"""
    )
    assert table > 200_000
    assert peak < table / 4


def test_a_large_block_goes_back_when_it_is_freed() -> None:
    grown, left = run(
        _STATUS
        + """
resident.keep_small()
import numpy as np
kept = [np.ones(40 << 17, np.float64) for _ in range(2)]  # 40 MiB each
del kept
start = kib("RssAnon")
blocks = [np.ones(1 << 17, np.float64) for _ in range(40)]  # 1 MiB each
last = np.ones(100)
grown = kib("RssAnon") - start
del blocks
resident.trim_heap()
print(json.dumps([grown, kib("RssAnon") - start]))
"""
    )
    assert grown > 39 << 10
    assert left < 1 << 10


def test_settings_of_the_user_win() -> None:
    lines = run(
        "import json, os\nfrom fedzo.edge_runtime.planning.resident import keep_small\nkeep_small()\n"
        "names = ('ORT_DISABLE_TELEMETRY', 'OPENBLAS_NUM_THREADS', 'NUMPY_MADVISE_HUGEPAGE')\n"
        "print(json.dumps([os.environ[name] for name in names]))",
        OPENBLAS_NUM_THREADS="2",
        NUMPY_MADVISE_HUGEPAGE="1",
        ORT_DISABLE_TELEMETRY="0",
    )
    assert lines == ["1", "2", "1"]
