"""Modules as a user would write them, and some that cannot be exported."""

from __future__ import annotations

from collections.abc import Callable

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


class Pooled(nn.Module):
    """A block between a convolution and adaptive pooling."""

    def __init__(self, block: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.block = block
        self.pool = pool
        self.last = nn.LazyLinear(3)
        self(torch.zeros(1, 2, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.block(torch.relu(self.first(x)))).flatten(1))  # type: ignore[no-any-return]


class Squeeze(nn.Module):
    """Squeeze and excitation, with a reshape to sizes that an exporter does not see through."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(-1, 8, 1, 1)


class Attend(nn.Module):
    """Self-attention over the positions of an image of 12x16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.project(x.flatten(2).transpose(1, 2)).view(-1, 192, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(*rows)
        return h.transpose(1, 2).reshape(-1, 12, 16, 8).permute(0, 3, 1, 2)


class Causal(nn.Module):
    """A convolution over time that sees no later step."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(nn.functional.pad(x, (2 * self.conv.dilation[0], 0))))


class Normalised(nn.Module):
    """Normal length, and pooling by a function of two results."""

    def forward(self, x: Tensor) -> Tensor:
        h, _ = nn.functional.adaptive_max_pool2d(nn.functional.normalize(x), (6, 8), return_indices=True)
        return nn.functional.adaptive_avg_pool2d(h, (3, 4))


def squeezed() -> nn.Module:
    return Pooled(Squeeze(), nn.AdaptiveAvgPool2d(4))


def attended() -> nn.Module:
    return Pooled(Attend(), nn.AdaptiveMaxPool2d((6, 4)))


def reflected() -> nn.Module:
    return Pooled(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d((3, None)))


def shuffled() -> nn.Module:
    return Pooled(nn.PixelUnshuffle(2), nn.AdaptiveAvgPool2d(1))


def normalised() -> nn.Module:
    return Pooled(nn.Identity(), Normalised())


def temporal() -> nn.Module:
    layers = [Causal(3, 8, 1), Causal(8, 8, 2), nn.AdaptiveMaxPool1d(12), Causal(8, 8, 4), nn.AdaptiveAvgPool1d(3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 4))


def uneven() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d((4, 7))), nn.Flatten())


class Bilinear(nn.Module):
    """An operator that torch's exporter does not know, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Bilinear(4, 4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        print("printed by the model")  # noqa: T201
        h = self.blocks[0](x)
        return self.blocks[1](h, h)  # type: ignore[no-any-return]


def bilinear() -> nn.Module:
    return Bilinear()


class Projected(nn.Module):
    """A recurrent layer of a kind that torch's exporter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 4, proj_size=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)[0][:, -1]  # type: ignore[no-any-return]


def projected() -> nn.Module:
    return Projected()


def choosing() -> nn.Module:
    """Torch's exporter writes its squeeze of an unknown size as a choice."""
    return nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.LocalResponseNorm(2), nn.Flatten())


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))


class Embedded(nn.Module):
    """Takes the numbers of a sample for rows of an embedding, by way of ``index``."""

    def __init__(self, index: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.index = index
        self.rows = nn.Embedding(6, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rows(self.index(x)).mean(1))  # type: ignore[no-any-return]


def token() -> nn.Module:
    return Embedded(Tensor.long)


def float_token() -> nn.Module:
    return Embedded(lambda x: x)


def position() -> nn.Module:
    return Embedded(lambda x: torch.arange(x.shape[1]).expand(x.shape[0], -1))


def clamped_token() -> nn.Module:
    return Embedded(lambda x: x.long().clamp(0, 5))


def scaled_token() -> nn.Module:
    return Embedded(lambda x: x.abs().mul(5).long())


class HalfBias(nn.Module):
    """Its first layer adds half of its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.addmm(self.first.bias, x, self.first.weight.t(), beta=0.5))
        return self.last(torch.tanh(self.second(h)))  # type: ignore[no-any-return]


def half_bias() -> nn.Module:
    return HalfBias()
