"""The system's limit on a device's memory, with real processes: what does not fit fails cleanly, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from fedzo.edge_runtime.planning.fence import SLACK_MIB

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts RLIMIT_DATA")


def run(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_ENGINE = """
import json, sys
from fedzo.edge_runtime.planning.resident import keep_small
keep_small()
import numpy as np
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.planning.fence import Fence
from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.pruning.mask import Mask

artifact = load_artifact(sys.argv[1])
manifest = artifact.manifest
mask, weights = Mask.dense(manifest.layout), initial_weights(manifest.layout, manifest.seed)
x, y = golden_batch(manifest.input_shape, manifest.n_classes, 1, 8)
each = max(slope for m in manifest.memory if m.name == "probe.onnx" for _, slope in m.envelope)
count = (80 << 20) // each
many, labels = np.resize(x, (count, *x.shape[1:])), np.resize(y, count)
# No limit of the arena: the fence is what stops it.
engine = Engine(artifact, mask, micro_batch=count, layout="portable")
before = engine.loss(weights, x, y)
fence = Fence()
limit = fence.set(1.0)
refused = []
for _ in range(2):
    try:
        engine.loss(weights, many, labels)
    except MemoryBudgetError as error:
        refused.append(error.exit_code)
try:
    np.ones(300 << 18)
except MemoryError:
    refused.append("numpy")
after = engine.loss(weights, x, y)
fence.lift()
whole = engine.loss(weights, many, labels)
print(json.dumps([limit, refused, before == after, abs(whole - before) < 0.5]))
"""


def test_an_engine_that_meets_the_fence_goes_on(tiny: Any) -> None:
    limit, refused, same, whole = run(_ENGINE, str(tiny.folder))
    assert limit > SLACK_MIB
    assert refused == [4, 4, "numpy"]
    assert same
    assert whole


_LIMITS = """
import json, resource
from fedzo.edge_runtime.planning.fence import Fence

kind = resource.RLIMIT_DATA
start, fence = resource.getrlimit(kind), Fence()
first = fence.set(10.0)
one = resource.getrlimit(kind)[0]
second = fence.set(500.0, threads=4)
more = resource.getrlimit(kind)[0]
fence.lift()
fence.lift()
back = resource.getrlimit(kind) == start
resource.setrlimit(kind, (20 << 20, start[1]))
kept = [fence.set(100.0), resource.getrlimit(kind)[0]]
fence.lift()
print(json.dumps([first, one, second, more, back, kept, resource.getrlimit(kind)[0]]))
"""


def test_the_limit_follows_the_plan_and_goes_back() -> None:
    first, one, second, more, back, kept, last = run(_LIMITS)
    assert one == pytest.approx(first * 2**20, abs=1)
    assert more == pytest.approx(second * 2**20, abs=1)
    assert second - first == pytest.approx(490 + 3 * 8, abs=4)
    assert back
    assert kept == [0.0, 20 << 20]  # a smaller limit of somebody else stays
    assert last == 20 << 20
