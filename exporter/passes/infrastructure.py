"""Passes over ONNX graphs: one transformation a class, with conditions that are checked before and after.

After onnx/ir-py's ``passes/_pass_infra.py``. Forward graphs hold no weights, so a pass works on a private copy of the
model: the caller's model never changes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto

from ...protocol.errors import FedzoError

__all__ = ["GraphPass", "PassError", "PassResult", "Sequential"]

logger = logging.getLogger(__name__)


class PassError(FedzoError):
    """A graph does not meet a pass's condition; names the pass and the condition."""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        model: The new model.
        modified: Whether it differs from the input.
    """

    model: ModelProto
    modified: bool


class GraphPass(ABC):
    """One transformation of a graph.

    A subclass edits the model that :meth:`transform` receives in place. :meth:`requires` and :meth:`ensures` raise
    :class:`PassError` through :meth:`check`; by default they accept everything.
    """

    @property
    def name(self) -> str:
        """Name used in messages."""
        return type(self).__name__

    def requires(self, model: ModelProto) -> None:  # noqa: B027
        """Check the input. The default accepts everything."""

    def ensures(self, model: ModelProto) -> None:  # noqa: B027
        """Check the output. The default accepts everything."""

    @abstractmethod
    def transform(self, model: ModelProto) -> bool:
        """Edit ``model`` in place; returns whether anything changed."""

    def check(self, condition: bool, message: str) -> None:
        """Raise :class:`PassError` with this pass's name unless ``condition`` holds."""
        if not condition:
            raise PassError(f"graph pass {self.name}: {message}")

    def __call__(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of ``model``.

        Raises:
            PassError: A condition does not hold, or the result is no valid ONNX model.
        """
        self.requires(model)
        copy = ModelProto()
        copy.CopyFrom(model)
        modified = self.transform(copy)
        self.ensures(copy)
        try:
            onnx.checker.check_model(copy)
        except onnx.checker.ValidationError as error:
            raise PassError(f"graph pass {self.name} made an invalid model: {error}") from None
        logger.debug("%s: modified=%s, %d nodes", self.name, modified, len(copy.graph.node))
        return PassResult(copy, modified)


class Sequential(GraphPass):
    """Passes one after another; a failure names the passes that ran before it."""

    def __init__(self, passes: Sequence[GraphPass]) -> None:
        self._passes = tuple(passes)

    def transform(self, model: ModelProto) -> bool:
        """Run the passes in order."""
        modified = False
        done: list[str] = []
        for step in self._passes:
            try:
                result = step(model)
            except PassError as error:
                raise PassError(f"{error.message} (after {', '.join(done) or 'no other pass'})") from error
            model.CopyFrom(result.model)
            modified |= result.modified
            done.append(step.name)
        return modified
