"""Networks with layers whose unit shifts do not show at the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def instance() -> nn.Module:
    """An instance normalisation takes away every constant of a channel."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def groups() -> nn.Module:
    """So does a group normalisation with one channel a group."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.GroupNorm(16, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, 16), nn.Linear(16, 6)
        self.queries, self.keys, self.values = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(1, 2))
        shares = torch.softmax(self.queries(h) @ self.keys(h).transpose(1, 2) / 4.0, -1)
        return self.last((h + shares @ self.values(h)).mean(1))  # type: ignore[no-any-return]


def attention() -> nn.Module:
    """A constant of all keys adds the same to every logit of the softmax."""
    return _Attention()


def zero_head() -> nn.Module:
    """Nothing shows in front of a head that starts at zero, nor does the head itself score."""
    last = nn.Linear(16, 10)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        last,
    )


class _Branch(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))  # type: ignore[no-any-return]


def zero_branch() -> nn.Module:
    """Nor in front of the last layer of a branch that starts at zero."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), _Branch(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
