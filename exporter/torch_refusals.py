"""Says why torch cannot run or export a module, and where in it."""

from __future__ import annotations

import re
import warnings

import torch
from torch import Tensor, nn

from ..protocol.errors import ConfigError
from .forward import OPSET

__all__ = ["cannot_export", "cannot_run"]

# What embedding, one_hot, gather and indexing say of numbers out of their range, and of floats.
_OUT_OF_RANGE = re.compile(r"index out of range in self|index -?\d+ is out of bounds|class values must", re.IGNORECASE)
_NO_INDEX = re.compile(
    r"argument #1 'indices'|tensors used as indices|expected dtype int64 for index|one_hot is only applicable",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"(?:the operator '|export of operator )(?:\w+::)?(\w+)")


def cannot_run(reference: str, module: nn.Module, x: Tensor, error: Exception) -> ConfigError:
    """The refusal of a module that fails on a batch of samples.

    Args:
        reference: The module's name in messages.
        module: The module.
        x: The batch.
        error: What it raised.
    """
    if _NO_INDEX.search(str(error)) or (_OUT_OF_RANGE.search(str(error)) and _runs(module, torch.zeros_like(x))):
        return ConfigError(
            f"{reference} takes its input for indices, and fails on the samples of the trial: {_named(error)}",
            hint="samples are float32, in the trial between -1 and 1, later normal numbers too: let the first layer map"
            " any number to an index, such as x.long().clamp(0, n - 1) for an embedding of n rows or n classes",
        )
    return ConfigError(
        f"{reference} cannot take a batch of shape {tuple(x.shape)}: {_named(error)}",
        hint="check --input: the shape of one sample without the batch axis",
    )


def _runs(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            module(x)
    except Exception:  # noqa: BLE001 (the user's own code)
        return False
    return True


def cannot_export(reference: str, module: nn.Module, x: Tensor, error: Exception) -> ConfigError:
    """The refusal of a module that torch's exporter fails on.

    Args:
        reference: The module's name in messages.
        module: What was to be exported.
        x: A batch that it can take.
        error: What the exporter raised.
    """
    text = re.split(r"\.? Please feel free|  \[Caused by", _named(error))[0]
    found = _OPERATOR.search(text)
    layers = _users(module, x, found.group(1)) if found else []
    where = f", in {' and '.join(layers)}" if layers else ""
    return ConfigError(
        f"torch cannot export {reference}: {text}{where}",
        hint=f"write it with operations that torch's exporter has for ONNX opset {OPSET}",
    )


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _users(module: nn.Module, x: Tensor, operator: str) -> list[str]:
    """The layers, at most three, that use an operator of torch; nothing if that cannot be told."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = torch.jit.trace(module, (x,), check_trace=False).inlined_graph  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 (it is only for the message)
        return []
    nodes = [node for name in {operator, operator.lower()} for node in graph.findAllNodes(f"aten::{name}")]
    scopes = [node.scopeName().rsplit("/", 1)[-1] for node in nodes]
    layers = dict.fromkeys(scope.removeprefix("__module").removeprefix(".") for scope in scopes)
    return [f"layer {name!r}" if name else "the module's own forward" for name in layers][:3]
