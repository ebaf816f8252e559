"""ResNet-50 and MobileNetV2 as torch modules, for ``fedzo export fedzo.experiments.shapes:resnet50``.

The layers are those of He et al. (CVPR 2016, table 1) and Sandler et al. (CVPR 2018, table 2) for 3x224x224 and 1,000
classes, with as many parameters; only batch normalisation is group normalisation, since batch statistics leak between
samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["INPUT_SHAPE", "N_CLASSES", "mobilenetv2", "resnet50"]

INPUT_SHAPE = (3, 224, 224)
N_CLASSES = 1000
_GROUPS = 8
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels, blocks, stride
_EXPANSION = 4
_INVERTED = (  # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.GroupNorm(_GROUPS, outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * _EXPANSION
        self.branch = nn.Sequential(
            _convolution(inputs, channels, 1, activation=nn.ReLU),
            _convolution(channels, channels, 3, stride, activation=nn.ReLU),
            _convolution(channels, outputs, 1),
        )
        self.shortcut = _convolution(inputs, outputs, 1, stride) if (inputs, stride) != (outputs, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [_convolution(inputs, hidden, 1, activation=nn.ReLU6)] if expansion > 1 else []
        self.branch = nn.Sequential(
            *widen,
            _convolution(hidden, hidden, 3, stride, hidden, nn.ReLU6),
            _convolution(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.branch(x)
        return x + found if self.residual else found


def resnet50() -> nn.Module:
    """ResNet-50: 25,557,032 parameters."""
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for channels, blocks, stride in _STAGES:
        for block in range(blocks):
            layers.append(_Bottleneck(inputs, channels, stride if block == 0 else 1))
            inputs = channels * _EXPANSION
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, N_CLASSES))


def mobilenetv2() -> nn.Module:
    """MobileNetV2 of width 1: 3,504,872 parameters."""
    layers: list[nn.Module] = [_convolution(3, 32, 3, 2, activation=nn.ReLU6)]
    inputs = 32
    for expansion, channels, blocks, stride in _INVERTED:
        for block in range(blocks):
            layers.append(_Inverted(inputs, channels, stride if block == 0 else 1, expansion))
            inputs = channels
    layers.append(_convolution(inputs, 1280, 1, activation=nn.ReLU6))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, N_CLASSES))
