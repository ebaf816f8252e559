"""LeNet-5 with rectified linear units: two convolutions, three fully connected layers, average pooling.

LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998. Dense second
convolution, no padding, no normalisation: 61,706 parameters for 1x32x32 and 62,006 for 3x32x32, with 10 classes.
"""

from __future__ import annotations

from ...protocol.errors import ConfigError
from ..forward import ForwardGraph, GraphBuilder

__all__ = ["build"]

MIN_SIDE = 16  # 16 -> 12 -> 6 -> 2 -> 1; one less leaves the second pooling without output


def build(name: str, input_shape: tuple[int, ...], n_classes: int) -> ForwardGraph:
    """The forward graph.

    Args:
        name: Registered name of the model.
        input_shape: ``(channels, height, width)``, both sides at least 16.
        n_classes: Number of logits.

    Raises:
        ConfigError: The input shape does not fit.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < MIN_SIDE:
        raise ConfigError(
            f"{name} takes inputs CxHxW with H and W of at least {MIN_SIDE}, not {'x'.join(map(str, input_shape))}",
            hint="pad or upsample the images; digits of 8x8 or 28x28 are commonly brought to 32x32",
        )
    graph = GraphBuilder(name, input_shape)
    h = graph.average_pool(graph.relu(graph.convolution("conv1", graph.x, 6, 5)))
    h = graph.average_pool(graph.relu(graph.convolution("conv2", h, 16, 5)))
    h = graph.relu(graph.linear("fc1", graph.flatten(h), 120))
    h = graph.relu(graph.linear("fc2", h, 84))
    return graph.finish(graph.linear("fc3", h, n_classes, output="logits"))
