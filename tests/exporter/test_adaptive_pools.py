"""adaptive_pools: pooling to a number of positions, wherever it stands in a torch module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.exporter.adaptive_pools import PlainPools
from fedzo.exporter.graphs import build_graphs
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.sessions import dense_feeds, run_graph
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ConfigError
from tests.exporter import user_models
from tests.exporter.text_graphs import dense_by_name

HERE = "tests.exporter.user_models"


@pytest.mark.parametrize(
    ("function", "shape", "classes"),
    [
        ("squeezed", (2, 12, 16), 3),
        ("attended", (2, 12, 16), 3),
        ("reflected", (2, 12, 16), 3),
        ("shuffled", (2, 12, 16), 3),
        ("normalised", (2, 12, 16), 3),
        ("temporal", (3, 24), 4),
    ],
)
def test_losses_are_those_of_torch(function: str, shape: tuple[int, ...], classes: int) -> None:
    forward = build_forward(f"{HERE}:{function}", shape, classes, 5)
    weights = initial_weights(forward.layout, 5)
    module = getattr(user_models, function)().eval()
    parameters = dict(module.named_parameters())
    probe = build_graphs(forward, 0.0).graphs["probe.onnx"]
    with torch.no_grad():
        for name, array in dense_by_name(forward.layout, weights).items():
            parameters[name].copy_(torch.from_numpy(array))
        for batch in (1, 3):
            x, y = golden_batch(shape, classes, batch, batch)
            logits = module(torch.from_numpy(x)).double()
            expected = float(nn.functional.cross_entropy(logits, torch.from_numpy(y), reduction="sum"))
            found = run_graph(probe, {**dense_feeds(forward.layout, weights), "x": x, "y": y})["loss_sum"]
            assert float(found) == pytest.approx(expected, rel=1e-5)


def test_all_functions_give_what_they_gave() -> None:
    module = nn.Identity()
    for axes in (1, 2, 3):
        x = torch.from_numpy(np.sin(np.arange(2 * 3 * 6**axes, dtype=np.float32)).reshape(2, 3, *[6] * axes))
        for kind in ("avg", "max"):
            pool = getattr(nn.functional, f"adaptive_{kind}_pool{axes}d")
            for target in (1, 2, 6, (3,) * axes, (None, *(1,) * (axes - 1)) if axes > 1 else 3):
                with PlainPools("it", module):
                    found = pool(x, target)
                torch.testing.assert_close(found, pool(x, target))
        places = getattr(nn.functional, f"adaptive_max_pool{axes}d_with_indices")
        with PlainPools("it", module):
            found = places(x, 2)
        for a, b in zip(found, places(x, 2), strict=True):
            torch.testing.assert_close(a, b)


def test_sizes_that_do_not_divide_are_refused() -> None:
    """The message names layer and sizes, the hint two ways out."""
    assert build_forward(f"{HERE}:uneven", (2, 14, 16), 112, 0).layout.size == 76
    with pytest.raises(ConfigError) as caught:
        build_forward(f"{HERE}:uneven", (2, 12, 16), 112, 0)
    assert caught.value.message.startswith(f"layer '1.1', AdaptiveAvgPool2d, of {HERE}:uneven pools 10x14")
    assert "positions to 4x7" in caught.value.message
    assert "pool to 5x7, or pad what is pooled to 12x14 positions" in caught.value.hint
    with pytest.raises(ConfigError, match="adaptive pooling in the module's own forward"), PlainPools("it", nn.ReLU()):
        nn.functional.adaptive_max_pool1d(torch.zeros(1, 1, 5), 2)
