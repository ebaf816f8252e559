"""Models by name: the built-in ones and the user's own ``module:function``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ...protocol.errors import ConfigError
from ..forward import ForwardGraph
from . import cnn1d, lenet, resnet

__all__ = ["MODELS", "build_forward"]

Builder = Callable[[str, tuple[int, ...], int], ForwardGraph]

MODELS: Mapping[str, Builder] = MappingProxyType(
    {"lenet5": lenet.build, **dict.fromkeys(resnet.DEPTHS, resnet.build), "cnn1d": cnn1d.build}
)
MAX_CLASSES = 1 << 20
MAX_SAMPLE = 1 << 26


def build_forward(model: str, input_shape: tuple[int, ...], n_classes: int, seed: int) -> ForwardGraph:
    """The forward graph of ``model``.

    Args:
        model: A key of :data:`MODELS`, or ``module:function`` that returns a ``torch.nn.Module``.
        input_shape: Shape of one sample, without the batch axis.
        n_classes: Number of logits.
        seed: Seed that a torch module is built under; the built-in models do not need it.

    Raises:
        ConfigError: The model is unknown or does not fit the input shape.
    """
    if not input_shape or min(input_shape) < 1:
        raise ConfigError(
            f"the input shape {'x'.join(map(str, input_shape)) or '(empty)'} has an axis below 1",
            hint="give the shape of one sample without the batch axis, for example 1x32x32",
        )
    size = 1
    for axis in input_shape:
        size *= axis
    if size > MAX_SAMPLE:
        raise ConfigError(f"one sample has {size} values, the limit is {MAX_SAMPLE}")
    if not 2 <= n_classes <= MAX_CLASSES:
        raise ConfigError(f"the number of classes is {n_classes}, it must be 2 to {MAX_CLASSES}")
    if ":" in model:
        from ..torch_import import import_torch_model  # torch takes a second to import: only when it is needed

        return import_torch_model(model, input_shape, n_classes, seed)
    builder = MODELS.get(model)
    if builder is None:
        close = difflib.get_close_matches(model, MODELS, n=1)
        raise ConfigError(
            f"there is no model {model!r}; there are {', '.join(MODELS)}",
            hint=f"did you mean {close[0]!r}?" if close else "give your own torch model as module:function",
        )
    return builder(model, input_shape, n_classes)
