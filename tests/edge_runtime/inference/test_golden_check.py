"""Golden predictions: right here, refused where a machine predicts something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.golden_check import check_predictions
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.protocol.errors import ArtifactError, SelfTestError


def changed(folder: Path, to: Path, change: Any) -> Artifact:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    raw = json.loads((to / "manifest.json").read_text())
    change(raw["golden"])
    (to / "manifest.json").write_text(json.dumps(raw))
    return load_artifact(to)


def test_this_machine_predicts_what_the_artifact_says(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.dense, micro_batch=4) as engine:
        difference = check_predictions(engine)
    assert difference is not None
    assert difference < 1e-6


@pytest.mark.parametrize("what", ["class", "logit"])
def test_other_predictions_are_refused(tiny: Any, tmp_path: Path, what: str) -> None:
    def change(golden: Any) -> None:
        predictions = golden["predictions"]
        if what == "class":
            predictions["classes"][3] = (predictions["classes"][3] + 1) % 3
        else:
            predictions["logits"][3] += 1e-3

    artifact = changed(tiny.folder, tmp_path, change)
    with Engine(artifact, tiny.dense) as engine, pytest.raises(SelfTestError, match="golden batch are wrong by"):
        check_predictions(engine)


def test_an_artifact_of_an_older_release_has_none(tiny: Any, tmp_path: Path) -> None:
    artifact = changed(tiny.folder, tmp_path, lambda golden: golden.pop("predictions"))
    with Engine(artifact, tiny.dense) as engine:
        assert check_predictions(engine) is None
        assert engine.check_golden() < 1e-5


def test_an_engine_with_a_mask_cannot_tell(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(ArtifactError, match="has a mask"):
        check_predictions(engine)
