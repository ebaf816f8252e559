"""The memory plan of a graph, against hand counts and against what onnxruntime's arena needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.exporter.live_set import envelope_of, live_envelope, measured_sizes
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, GRAPHS, TAIL_GRAPHS, Manifest
from fedzo.protocol.artifact.stages import local_stages, stage_graph
from fedzo.protocol.errors import ConfigError
from tests.exporter.text_graphs import parse

KIB = 1024


def envelope(text: str, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    model = parse(text)
    return live_envelope(model, measured_sizes(model, lambda batch: {"x": np.zeros((batch, *shape), np.float32)}))


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("one tensor", "logits = Sqrt (x)", ((0, 1 * KIB),)),
        ("two at a time", "a = Sqrt (x) b = Exp (a) logits = Log (b)", ((0, 2 * KIB),)),
        ("an activation is in place", "a = Sqrt (x) b = Relu (a) c = Tanh (b) logits = Neg (c)", ((0, 2 * KIB),)),
        ("not over a value that is used later", "a = Sqrt (x) b = Relu (a) logits = Add (a, b)", ((0, 3 * KIB),)),
        ("not over the input", "a = Relu (x) logits = Add (a, x)", ((0, 2 * KIB),)),
        ("a sum is not in place", "a = Sqrt (x) b = Sqrt (x) c = Add (a, b) logits = Neg (c)", ((0, 3 * KIB),)),
        ("a reshape is an alias", "s = Shape (x) a = Sqrt (x) b = Reshape (a, s) logits = Neg (b)", ((256, 2 * KIB),)),
        ("held over a chain", "a = Sqrt (x) b = Neg (a) c = Abs (b) logits = Add (c, a)", ((0, 3 * KIB),)),
    ],
)
def test_hand_counts(name: str, body: str, expected: tuple[tuple[int, int], ...]) -> None:
    text = f"g (float[batch, 256] x) => (float[batch, 256] logits) {{ {body} }}"
    assert envelope(text, (256,)) == expected, name


def test_constants_and_a_convolution_workspace_are_fixed() -> None:
    ones = ", ".join(["1"] * 18)
    text = f"""
    g (float[batch, 1, 16, 16] x) => (float[batch, 2, 16, 16] y) <float[2, 1, 3, 3] k = {{{ones}}}> {{
        y = Conv <pads = [1, 1, 1, 1]> (x, k)
    }}
    """
    assert envelope(text, (1, 16, 16)) == ((256 + 64 * KIB, 2 * KIB),)
    pointwise = text.replace("2, 1, 3, 3", "2, 1, 1, 1").replace(ones, "1, 1").replace("<pads = [1, 1, 1, 1]>", "")
    assert envelope(pointwise, (1, 16, 16)) == ((256, 2 * KIB),)
    # With more filters than positions the whole input is unfolded: 4 bytes x 4 positions x 9 weights, to 256.
    small = text.replace("16", "2").replace("2, 2] y", "2, 2] y").replace("[2, 1, 3, 3]", "[9, 1, 3, 3]")
    small = small.replace("batch, 2, 2, 2", "batch, 9, 2, 2").replace(ones, ", ".join(["1"] * 81))
    assert envelope(small, (1, 2, 2)) == ((512 + 256 + 255, 144),)


def test_sizes_that_are_no_multiple_of_the_alignment_are_rounded_up() -> None:
    assert envelope("g (float[batch, 10] x) => (float[batch, 10] y) { y = Sqrt (x) }", (10,)) == ((255, 40),)


def test_a_model_that_mixes_samples_is_refused() -> None:
    text = """
    g (float[batch, 3] x) => (float[batch, other] y) { t = Transpose <perm = [1, 0]> (x) y = MatMul (x, t) }
    """
    with pytest.raises(ConfigError, match=r"the size of 'y' is 4, 16 and 36 bytes for batches of 1, 2 and 3"):
        envelope(text, (3,))


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=20))
def test_the_envelope_is_the_largest_line_and_has_no_spare_one(points: Sequence[tuple[int, int]]) -> None:
    hull = envelope_of(points)
    assert set(hull) <= set(points)
    for batch in (*range(1, 60), 1000, 10**6):
        assert max(f + p * batch for f, p in hull) == max(f + p * batch for f, p in points)
    assert sorted(hull, key=lambda pair: pair[1]) == list(hull)
    assert len({p for _, p in hull}) == len(hull)


ARENA = """
import json, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
from pathlib import Path
import numpy as np, onnxruntime as ort
from fedzo.edge_runtime.inference.ort import arena_limit_holds
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, TAIL_GRAPHS, Manifest, golden_batch
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.artifact.stages import local_stages

folder, batch = Path(sys.argv[1]), int(sys.argv[2])
manifest = Manifest.decode((folder / "manifest.json").read_bytes())
mask = Mask.dense(manifest.layout)
x, y = golden_batch(manifest.input_shape, manifest.n_classes, 0, batch)
feeds = {"w": np.zeros(mask.n_survivors, np.float32), "index": mask.index(), "counts": mask.counts(), "x": x, "y": y,
         "shift": np.zeros(manifest.n_units, np.float32)}
hidden = sum(units for units, _ in manifest.tail.shapes(manifest.layout)[:-1]) if manifest.tail else 0


def weights_of(first, end):
    # The part of the weights that belongs to some parameters.
    n, m = int(mask.counts()[:first].sum()), int(mask.counts()[:end].sum())
    return {"w": feeds["w"][n:m], "index": feeds["index"][n:m], "counts": feeds["counts"][first:end]}


def feeds_of_stage(name):
    number, _, kind = name.removeprefix("stage").removesuffix(".onnx").partition("_")
    stage = (local_stages(manifest.stages) if kind == "local" else manifest.stages)[int(number)]
    owner = manifest.stages[-1] if kind == "head" else stage
    entered = stage.output_shape if kind == "head" else stage.feature_shape
    return {**weights_of(owner.first_parameter, owner.end_parameter), "y": y,
            "features": np.zeros((batch, *entered), np.float32),
            "cotangent": np.zeros((batch, *stage.output_shape), np.float32),
            "head": np.zeros(stage.head_size(manifest.layout), np.float32)}


def feeds_of(name):
    # Each half of a cut network takes its part of the weights.
    cut = manifest.tail.cut if manifest.tail and name in TAIL_GRAPHS else manifest.cut
    halves = TAIL_GRAPHS if name in TAIL_GRAPHS else CUT_GRAPHS
    if name.startswith("stage"):
        return feeds_of_stage(name)
    n_parameters = len(manifest.model_layout.parameters)
    if name not in halves:
        return {**feeds, **weights_of(0, n_parameters)}
    ends = [(0, cut.first_parameter), (cut.first_parameter, n_parameters)]
    return {**feeds, **weights_of(*ends[halves.index(name)]),
            "features": np.zeros((batch, *cut.feature_shape), np.float32),
            "noise": np.zeros((batch, hidden), np.float32)}


def fits(name, limit):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {"max_mem": limit, "arena_extend_strategy": 1, "initial_chunk_size_bytes": 4096}
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(settings))
    try:
        session = ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for _ in range(2):
            known = feeds_of(name)
            weights = {value.name: value.shape for value in session.get_inputs() if value.name not in known}
            known = {**known, **{key: np.zeros(shape, np.float32) for key, shape in weights.items()}}
            session.run(None, {value.name: known[value.name] for value in session.get_inputs()})
    except Exception as error:
        assert "memory" in str(error), error
        return False
    return True


if not arena_limit_holds():
    print("null")
    sys.exit()
needed = {}
for graph in (*manifest.graphs, *(variant.file for variant in manifest.variants)):
    low, high = 0, 1 << 26
    while high - low > 4096:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(graph.name, middle) else (middle, high)
    needed[graph.name] = high
print(json.dumps(needed))
"""


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("model", ["lenet5", "resnet8", "lenet5_with_heads", "cnn1d_with_heads"])
def test_the_arena_needs_what_the_plan_says(model: str, batch: int, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    command = [sys.executable, "-c", ARENA, str(folder), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    needed: dict[str, Any] | None = json.loads(done.stdout)
    if needed is None:
        pytest.skip("this onnxruntime keeps its first arena for good, so no limit can be tried")
    assert set(needed) == {plan.name for plan in manifest.memory}
    layout, stages = manifest.model_layout, manifest.stages
    sizes = dict.fromkeys(GRAPHS, layout.size)
    for cut, names in ((manifest.cut, CUT_GRAPHS), (manifest.tail and manifest.tail.cut, TAIL_GRAPHS)):
        sizes |= {name: part.size for name, part in zip(names, cut.split(layout), strict=True)} if cut else {}
    sizes |= {stage_graph(s.number, kind): s.layout(layout).size for s in stages for kind in ("forward", "gradient")}
    sizes |= {stage_graph(s.number, "local"): s.layout(layout).size for s in local_stages(stages)}
    sizes |= {stage_graph(s.number, "head"): stages[-1].layout(layout).size for s in stages[-2:-1]}
    for name, size in needed.items():
        parts = 8 * sizes.get(name, 0)  # into which w and index are split; a variant has none
        plan = manifest.live_bytes(name, batch) + parts
        # A plan holds for any sparsity. Here, where all parts are there, what is let go of them leaves room.
        assert 0.75 * plan - 128 * KIB <= size <= 1.01 * plan + 16 * KIB, (name, size, plan)
