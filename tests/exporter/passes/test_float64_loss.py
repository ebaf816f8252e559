"""float64_loss: the sum of the cross-entropy, in double precision."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.exporter.passes.float64_loss import Float64Loss
from fedzo.exporter.passes.infrastructure import PassError
from fedzo.protocol.errors import ConfigError
from tests.exporter.text_graphs import numbers, output, parse, signature

IDENTITY = """
identity (float[batch, 4] x) => (float[batch, 4] logits) {
    logits = Identity (x)
}
"""


@pytest.mark.parametrize("scale", [1.0, 30.0, 500.0])
@pytest.mark.parametrize("batch", [1, 7])
def test_sum_of_cross_entropies(batch: int, scale: float) -> None:
    model = Float64Loss()(parse(IDENTITY)).model
    x = numbers(batch, 4) * np.float32(scale)
    y = np.arange(batch, dtype=np.int64) % 4
    z = x.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    expected = float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(batch), y]).sum())
    loss = output(model, {"x": x, "y": y})
    assert loss.shape == ()
    assert loss.dtype == np.float64
    assert float(loss) == pytest.approx(expected, rel=1e-13)
    assert signature(model) == {"x": ["batch", 4], "y": ["batch"], "loss_sum": []}


def test_a_difference_below_float32_is_seen() -> None:
    model = Float64Loss()(parse(IDENTITY)).model
    x, y = np.zeros((64, 4), np.float32), np.zeros(64, np.int64)
    before = float(output(model, {"x": x, "y": y}))
    x[0, 0] = 1e-9  # changes the sum by 7.5e-10; one step of a float32 sum of 88.7 is 7.6e-6
    change = float(output(model, {"x": x, "y": y})) - before
    assert change == pytest.approx(-7.5e-10, rel=1e-4)


def test_a_label_out_of_range_is_an_error() -> None:
    model = Float64Loss()(parse(IDENTITY)).model
    with pytest.raises(ConfigError, match="cannot run the graph"):
        output(model, {"x": numbers(2, 4), "y": np.array([0, 4], np.int64)})


def test_needs_logits() -> None:
    with pytest.raises(PassError, match="Float64Loss: the graph's output is not logits"):
        Float64Loss()(parse(IDENTITY.replace("logits", "scores")))
    with pytest.raises(PassError, match="the graph's output is not logits"):
        Float64Loss()(Float64Loss()(parse(IDENTITY)).model)
