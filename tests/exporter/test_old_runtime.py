"""An exported graph under the oldest onnxruntime that fedzo supports, without onnx, torch or fedzo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedzo.exporter.artifact import verify_artifact
from fedzo.exporter.sessions import dense_feeds
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch

OLDEST = ("onnxruntime==1.17.3", "numpy==1.26.4")

PROBE = """
import sys
import numpy as np, onnxruntime as ort
assert ort.__version__ == "1.17.3" and np.__version__ == "1.26.4"
feeds = dict(np.load(sys.argv[2]))
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
options.intra_op_num_threads = 1
for name in ("predict.onnx", "saliency.onnx", "moments.onnx", "probe.onnx"):
    session = ort.InferenceSession(f"{sys.argv[1]}/{name}", options, providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {key.name: feeds[key.name] for key in session.get_inputs()})
    assert np.isfinite(value).all(), name
print(repr(float(value) / len(feeds["x"])))
for name in sys.argv[3:]:
    session = ort.InferenceSession(f"{sys.argv[1]}/{name}", options, providers=["CPUExecutionProvider"])
    named = {key.name: feeds[key.name] if key.name in ("x", "y") else np.zeros(key.shape, np.float32)
             for key in session.get_inputs()}
    (value,) = session.run(None, named)
    assert np.allclose(value, len(feeds["x"]) * np.log(10)), (name, value)  # all logits are equal
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(sys.version_info >= (3, 13), reason=f"{OLDEST[0]} has no wheels for this Python")
def test_the_golden_loss_under_the_oldest_onnxruntime(lenet5: Path, resnet8: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120, capture_output=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--retries=2", "--timeout=20"]
    command = [str(python), "-m", "pip", "install", *options, *OLDEST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install {OLDEST}: {done.stderr.strip().splitlines()[-1:]}")
    for folder in (lenet5, resnet8):
        manifest = verify_artifact(folder)
        golden = manifest.golden
        x, y = golden_batch(manifest.input_shape, manifest.n_classes, golden.seed, golden.batch)
        shift = np.zeros(manifest.n_units, np.float32)
        feeds = {**dense_feeds(manifest.layout, initial_weights(manifest.layout, manifest.seed)), "x": x, "y": y}
        np.savez(tmp_path / "feeds.npz", shift=shift, **feeds)  # type: ignore[arg-type]
        portable = [variant.file.name for variant in manifest.variants if variant.machine == "any"]
        assert len(portable) == (folder == lenet5)
        command = [str(python), "-c", PROBE, str(folder), str(tmp_path / "feeds.npz"), *portable]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(golden.mean_loss, abs=golden.tolerance)
