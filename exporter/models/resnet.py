"""ResNet-8, 20, 32 and 56 for small images, with group normalisation and projection shortcuts.

He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2: three stages of 16, 32 and 64
channels. Batch statistics leak between samples and differ between devices, so normalisation is GroupNorm(8) (Hsieh et
al., "The non-IID data quagmire of decentralized machine learning", ICML 2020, section 5). ResNet-20 has 272,474
parameters for 3x32x32 and 10 classes.
"""

from __future__ import annotations

from ...protocol.errors import ConfigError
from ..forward import ForwardGraph, GraphBuilder, Tensor

__all__ = ["DEPTHS", "build"]

DEPTHS = {"resnet8": 8, "resnet20": 20, "resnet32": 32, "resnet56": 56}
CHANNELS = (16, 32, 64)
GROUPS = 8
MIN_SIDE = 8


def build(name: str, input_shape: tuple[int, ...], n_classes: int) -> ForwardGraph:
    """The forward graph.

    Args:
        name: A key of :data:`DEPTHS`.
        input_shape: ``(channels, height, width)``, both sides at least 8.
        n_classes: Number of logits.

    Raises:
        ConfigError: The input shape does not fit.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < MIN_SIDE:
        raise ConfigError(
            f"{name} takes inputs CxHxW with H and W of at least {MIN_SIDE}, not {'x'.join(map(str, input_shape))}",
            hint="pad or upsample the images",
        )
    blocks = (DEPTHS[name] - 2) // 6
    graph = GraphBuilder(name, input_shape)
    h = _convolution(graph, "conv1", "norm1", graph.x, CHANNELS[0])
    h = graph.relu(h)
    for stage, channels in enumerate(CHANNELS, start=1):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 1 else 1
            h = _block(graph, f"layer{stage}.{block}", h, channels, stride)
    return graph.finish(graph.linear("fc", graph.global_average_pool(h), n_classes, output="logits"))


def _block(graph: GraphBuilder, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    h = graph.relu(_convolution(graph, f"{name}.conv1", f"{name}.norm1", x, channels, stride=stride))
    h = _convolution(graph, f"{name}.conv2", f"{name}.norm2", h, channels)
    if x.shape != h.shape:
        x = _convolution(graph, f"{name}.shortcut.conv", f"{name}.shortcut.norm", x, channels, kernel=1, stride=stride)
    return graph.relu(graph.add(h, x, f"{name}.sum"))


def _convolution(
    graph: GraphBuilder, name: str, norm: str, x: Tensor, channels: int, *, kernel: int = 3, stride: int = 1
) -> Tensor:
    h = graph.convolution(name, x, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return graph.group_normalisation(norm, h, GROUPS)
