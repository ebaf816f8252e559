"""The demo, short."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest

from tests.board_fixture import ROOT
from tests.end_to_end.fleet import Process

KEYS = {
    "accuracy",
    "rounds",
    "queries",
    "bytes_up_per_device_round",
    "bytes_down_per_device_round",
    "device_peak_rss_mib",
    "wall_s",
    "weights_digest",
    "digests_agree",
    "deployed_model",
}


@pytest.mark.slow
def test_the_demo_prints_one_json_object(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "demo.py", "--rounds", 10, "--devices", 3, "--json"]
    demo = Process("demo", command, tmp_path)
    try:
        numbers = demo.answer(180.0)
    finally:
        demo.kill()
    assert numbers.keys() >= KEYS
    assert numbers["digests_agree"] is True
    assert numbers["rounds"] == 10
    assert 0 <= numbers["accuracy"] <= 1
    # One clean loss, 8 perturbed ones and 18 passes through the tail a round and device; and the scores.
    assert numbers["queries"] > 3 * 10 * 27
    assert 20 < numbers["device_peak_rss_mib"] < 200
    assert len(bytes.fromhex(numbers["weights_digest"])) == 16
    model = tmp_path / numbers["deployed_model"]
    assert [v.name for v in onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()] == [
        "x"
    ]
    # The devices' data and logs are gone, the model stays.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [model.name]
