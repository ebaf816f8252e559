"""Writes torch's adaptive pooling as ordinary pooling while a module is traced.

ONNX has windows of one size only, and torch's exporter must know the sizes of a value for them; behind a reshape, for
example, it knows them no more. Here they are taken from the tensor that the traced call sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..protocol.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PlainPools"]

_Function = Callable[..., Any]

_MEANS: Mapping[_Function, tuple[int, _Function]] = {
    functional.adaptive_avg_pool1d: (1, functional.avg_pool1d),
    functional.adaptive_avg_pool2d: (2, functional.avg_pool2d),
    functional.adaptive_avg_pool3d: (3, functional.avg_pool3d),
}
_MAXIMA: Mapping[_Function, tuple[int, _Function]] = {
    functional.adaptive_max_pool1d: (1, functional.max_pool1d),
    functional.adaptive_max_pool2d: (2, functional.max_pool2d),
    functional.adaptive_max_pool3d: (3, functional.max_pool3d),
}
_WITH_PLACES: Mapping[_Function, tuple[int, _Function]] = {
    torch.adaptive_max_pool1d: (1, functional.max_pool1d),
    functional.adaptive_max_pool1d_with_indices: (1, functional.max_pool1d),
    functional.adaptive_max_pool2d_with_indices: (2, functional.max_pool2d),
    functional.adaptive_max_pool3d_with_indices: (3, functional.max_pool3d),
}
_FUNCTIONS = {**_MEANS, **_MAXIMA, **_WITH_PLACES}
"""Function of torch -> axes that it pools, and the function for windows of one size."""


class PlainPools(TorchFunctionMode):
    """While it is active, adaptive pooling is done by windows of one size.

    The mean over all positions stays as it is: ONNX has an operator for it.

    Args:
        reference: The module's name in messages.
        module: What is going to be called.

    Raises:
        ConfigError: In the call, where a size is no multiple of what it is pooled to.
    """

    def __init__(self, reference: str, module: nn.Module) -> None:
        super().__init__()
        self._reference = reference
        self._names = {id(layer): name for name, layer in module.named_modules()}
        self._inside: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        """Follow which module is being called from now on, and pool plainly."""
        self._hooks = [
            register_module_forward_pre_hook(lambda layer, _: self._inside.append(layer)),
            register_module_forward_hook(lambda *_: self._leave()),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        """Put everything back."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._inside.clear()

    def _leave(self) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of every function of tensors."""
        if func not in _FUNCTIONS:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("input", "output_size", "return_indices"), args, strict=False)) | dict(kwargs or {})
        axes, plain = _FUNCTIONS[func]
        sizes = [int(size) for size in named["input"].shape[-axes:]]
        wanted = named["output_size"]
        wanted = list(wanted) if isinstance(wanted, Sequence) else [wanted] * axes
        targets = [size if n is None else int(n) for size, n in zip(sizes, wanted, strict=True)]
        if func in _MEANS and math.prod(targets) == 1:
            return func(*args, **(kwargs or {}))
        if any(n < 1 or size % n for size, n in zip(sizes, targets, strict=True)):
            raise self._refusal(sizes, targets)
        kernel = [size // n for size, n in zip(sizes, targets, strict=True)]
        if func in _MEANS:
            return plain(named["input"], kernel, count_include_pad=False)
        return plain(named["input"], kernel, return_indices=func in _WITH_PLACES or named.get("return_indices", False))

    def _refusal(self, sizes: Sequence[int], targets: Sequence[int]) -> ConfigError:
        layer = self._inside[-1] if self._inside else None
        name = self._names.get(id(layer), "")
        where = f"layer {name!r}, {type(layer).__name__}," if name else "adaptive pooling in the module's own forward"
        nearest = [_nearest_divisor(size, n) for size, n in zip(sizes, targets, strict=True)]
        padded = [math.ceil(size / max(n, 1)) * max(n, 1) for size, n in zip(sizes, targets, strict=True)]
        return ConfigError(
            f"{where} of {self._reference} pools {_by(sizes)} positions to {_by(targets)}, which windows of one size"
            " cannot",
            hint=f"pool to {_by(nearest)}, or pad what is pooled to {_by(padded)} positions: each size must be a"
            " multiple of what it becomes",
        )


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - wanted))


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
