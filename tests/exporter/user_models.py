"""Modules as a user would write them, and some that cannot be exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NOT_A_FUNCTION = 3


class Mixed(nn.Module):
    """Strided and grouped convolutions, three normalisations, a product over tokens, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 8, 3, groups=2, padding="same")
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.tokens = nn.Linear(16, 16)
        self.layer = nn.LayerNorm(16)
        self.dropout = nn.Dropout()
        self.last = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.group(self.first(x)))
        h = nn.functional.gelu(self.instance(self.second(h)))
        h = nn.functional.adaptive_avg_pool2d(h, 8)
        h = self.layer(self.tokens(h.reshape(h.shape[0], -1, 16)))
        return self.last(self.dropout(h.flatten(1)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer, a weight used twice, a frozen layer, a buffer, and parameters called like graph inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(4, 8))
        self.counts = nn.Parameter(torch.zeros(8))
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("offset", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.gru(x.transpose(1, 2) @ self.w + self.counts)
        h = self.twice(torch.relu(self.twice(h)))
        return self.last((self.frozen(h) + self.offset).mean(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A weight used twice, one that is not transposed, and one that is tied to its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.twice = nn.Linear(12, 12)
        self.plain = nn.Parameter(0.3 * torch.randn(12, 10))
        self.both = nn.Parameter(0.3 * torch.randn(10, 10))
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
        h = torch.relu(h @ self.plain)
        return self.last(torch.relu(h @ self.both) @ self.both.T)  # type: ignore[no-any-return]


class Dependent(nn.Module):
    """Takes another path for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) if len(x) > 1 else -self.last(x)  # type: ignore[no-any-return]


class Mixing(nn.Module):
    """Lets samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.softmax(x @ x.T, 1) @ x)  # type: ignore[no-any-return]


class Baked(nn.Module):
    """Takes a number out of a parameter, where tracing loses it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) * float(self.last.weight.detach().norm())  # type: ignore[no-any-return]


def baked() -> nn.Module:
    return Baked()


def mixed() -> nn.Module:
    return Mixed()


def recurrent() -> nn.Module:
    return Recurrent()


def attention() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(9, 16)
            self.encode = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.last = nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.encode(self.project(x.transpose(1, 2))).mean(1))  # type: ignore[no-any-return]

    return Attention()


def mobile() -> nn.Module:
    """Depthwise separable convolutions without biases."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
        nn.GroupNorm(4, 8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def equal() -> nn.Module:
    """Two normalisations and two biases that only start equal."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return model


def bare() -> nn.Module:
    """No layer that can be pruned."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    return Bare()


def batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 10))


def running_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten())


def frozen() -> nn.Module:
    return nn.Linear(4, 2).requires_grad_(False)


def double() -> nn.Module:
    return nn.Linear(4, 2).double()


def broken() -> nn.Module:
    raise ZeroDivisionError("the user's own mistake")


def number() -> int:
    return 3


def shifted() -> nn.Module:
    model = nn.Linear(4, 4)
    nn.init.normal_(model.weight, 5.0, 0.1)
    return model


def infinite() -> nn.Module:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, float("inf"))
    return model


def tied() -> nn.Module:
    return Tied()


def dependent() -> nn.Module:
    return Dependent()


def mixing() -> nn.Module:
    return Mixing()


def linear() -> nn.Module:
    return nn.Linear(4, 2)


def one_layer() -> nn.Module:
    return nn.Linear(6, 4)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def deep() -> nn.Module:
    layers = [layer for _ in range(11) for layer in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, 3))
