"""Networks whose tensors leave pieces in the arena that later ones do not fit into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def widening() -> nn.Module:
    """Convolutions of 8, 16, 32 and 64 channels without a stride."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _Inverted(nn.Module):
    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, inside, 1)
        self.depth = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.narrow = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu6(self.depth(functional.relu6(self.widen(x))))
        return x + self.narrow(inner)  # type: ignore[no-any-return]


def inverted() -> nn.Module:
    """Two inverted residual blocks."""
    blocks = [_Inverted(8, 32), _Inverted(8, 32)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def over_time() -> nn.Module:
    """Convolutions over time of 16, 32 and 64 channels."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv1d(before, after, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))


def hard_swish() -> nn.Module:
    """An activation that is a function of two nodes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Hardswish(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)
    )


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 32, batch_first=True, bidirectional=True)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x.transpose(1, 2))[0].mean(1))  # type: ignore[no-any-return]


def recurrent() -> nn.Module:
    """A GRU in both directions."""
    return _Recurrent()


class _Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.softmax(self.first(x), 1)
        return self.last(functional.adaptive_avg_pool2d(torch.where(h > 0.1, h, 0.3 * h), 4).flatten(1))  # type: ignore[no-any-return]


def chosen() -> nn.Module:
    """A softmax over channels, and ``Where``."""
    return _Chosen()


def perceptron() -> nn.Module:
    """Large layers, small tensors."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 600), nn.ReLU(), nn.Linear(600, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def frozen() -> nn.Module:
    """A large layer that is not trained."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 10))
    layers[1].requires_grad_(False)
    return layers
