"""A small one-dimensional convolutional network for sensor windows, for example 9x128.

Three convolutions over time with rectified linear units, global average pooling and one linear layer; 12,042 + 224 C
parameters for C channels and K = 10 classes, the usual size for wearable sensors (Wang et al., "Time series
classification from scratch with deep neural networks", IJCNN 2017, without their normalisation).
"""

from __future__ import annotations

from ...protocol.errors import ConfigError
from ..forward import ForwardGraph, GraphBuilder

__all__ = ["build"]

MIN_LENGTH = 26


def build(name: str, input_shape: tuple[int, ...], n_classes: int) -> ForwardGraph:
    """The forward graph.

    Args:
        name: Registered name of the model.
        input_shape: ``(channels, samples)``, at least 26 samples.
        n_classes: Number of logits.

    Raises:
        ConfigError: The input shape does not fit.
    """
    if len(input_shape) != 2 or input_shape[1] < MIN_LENGTH:
        raise ConfigError(
            f"{name} takes inputs CxL with L of at least {MIN_LENGTH}, not {'x'.join(map(str, input_shape))}",
            hint="use longer windows; images need lenet5 or a resnet",
        )
    graph = GraphBuilder(name, input_shape)
    h = graph.average_pool(graph.relu(graph.convolution("conv1", graph.x, 32, 7)))
    h = graph.average_pool(graph.relu(graph.convolution("conv2", h, 32, 5)))
    h = graph.relu(graph.convolution("conv3", h, 64, 3))
    return graph.finish(graph.linear("fc", graph.global_average_pool(h), n_classes, output="logits"))
