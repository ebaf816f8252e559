"""A run with one real device process on this machine, for what that process says of its memory."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["device_summary", "write_samples"]

SAMPLES = 200
TIMEOUT_S = 1200


def write_samples(path: Path, shape: tuple[int, ...]) -> Path:
    """Seeded noise with labels, as ``uint8`` images."""
    x = np.random.default_rng(1).integers(0, 256, (SAMPLES, *shape), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(SAMPLES) % 10)
    return path


def device_summary(artifact: Path, data: Path, budget_mib: float, batch: int, sparsity: float) -> dict[str, Any]:
    """Serve an artifact to one ``fedzo-device join`` for two updates; ``batch`` inputs are scored.

    Returns:
        The device's summary, with ``planned_peak_mib`` and ``peak_rss_mib``.

    Raises:
        RuntimeError: The device did not end well.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    serve = [sys.executable, "-m", "fedzo.cli", "serve", str(artifact), "--runs", str(artifact.parent / "runs")]
    serve += ["--devices", "1", "--quorum", "1", "--rounds", "2", "--k", "2", "--batch", str(batch)]
    serve += ["--sparsity", str(sparsity), "--saliency-samples", str(batch), "--deadline", str(TIMEOUT_S)]
    serve += ["--host", "127.0.0.1", "--port", port]
    join = [sys.executable, "-m", "fedzo.edge_runtime", "join", f"mqtt://127.0.0.1:{port}", "--data", str(data)]
    join += ["--ram-budget-mib", str(budget_mib), "--state", str(artifact.parent / f"state-{port}"), "--json"]
    with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            done = subprocess.run(join, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            server.wait(60)
        finally:
            server.terminate()
    summary: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    if done.returncode or summary.get("status") != "done":
        raise RuntimeError(f"the device ended with {done.returncode}: {done.stderr[-500:]}")
    return summary
