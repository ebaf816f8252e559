"""Which form of the probe graph an engine computes single losses with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.errors import ConfigError
from .ort import runtime_version
from .variants import matching_variant

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["LayoutChoice", "chosen_variant"]

LayoutChoice = Literal["auto", "portable", "blocked"]


def chosen_variant(engine: Engine, layout: LayoutChoice) -> GraphVariant | None:
    """The variant for this machine, or None for the portable graph.

    Raises:
        ConfigError: ``layout`` is unknown, or it is ``blocked`` and there is no variant for this machine.
    """
    if layout not in get_args(LayoutChoice):
        raise ConfigError(f"the layout is {layout!r}, it must be one of {', '.join(get_args(LayoutChoice))}")
    if layout == "portable":
        return None
    variant = matching_variant(engine.artifact.manifest, "probe.onnx")
    usable = variant is not None and engine.can_open(variant)
    if layout == "blocked":
        if not usable:
            raise ConfigError(
                f"{engine.artifact.source} has no graph for this processor and onnxruntime {runtime_version()}",
                hint="export it again on this machine, or use the layout auto",
            )
        return variant
    return variant if variant is not None and usable and engine.fits(variant) else None
