"""Scores of a network are refused before a run if no report has room for them."""

from __future__ import annotations

import dataclasses
import types

import pytest

from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.mask_choice import check_pruning
from fedzo.protocol.settings import RunSettings, SaliencySettings
from tests.protocol.simulation.fakes import manifest_for


def test_scores_that_fit_no_report_are_refused_before_the_run() -> None:
    manifest = manifest_for("stein")
    wide = dataclasses.replace(manifest.units[0], n_units=40_000, n_moments=30_000)
    huge = types.SimpleNamespace(  # a manifest checks that its units fit its layout
        model="wide", layout=manifest.layout, units=(wide,), n_units=wide.n_units, n_moments=wide.n_moments
    )
    settings = RunSettings(sparsity=0.5)
    with pytest.raises(ConfigError, match=r"the scores of wide are 70,000 numbers a board, a report holds 60,000"):
        check_pruning(huge, settings)  # type: ignore[arg-type]
    for fitting in (
        dataclasses.replace(settings, sparsity=0.0),
        dataclasses.replace(settings, saliency=SaliencySettings(method="magnitude")),
    ):
        check_pruning(huge, fitting)  # type: ignore[arg-type]
