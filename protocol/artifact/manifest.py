"""What an artifact folder says of itself: ``manifest.json``, parsed and checked.

An artifact is a folder of ONNX graphs without weights. This module holds its description only; files are written by
the exporter and read by the board runtime.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from .cut import Cut
from .dense_tail import DenseTail
from .golden_answer import Golden, golden_batch
from .graph_files import GraphFile, GraphMemory, GraphVariant
from .graph_work import GraphWork
from .layout import Layout
from .sections import Sections, is_section_graph
from .stages import Stage, check_stages, is_stage_graph, model_layout, stage_graph, stages_from_json
from .structure import Structure

__all__ = [
    "CUT_GRAPHS",
    "FORMAT",
    "GRAPHS",
    "GRAPH_NAMES",
    "TAIL_GRAPHS",
    "Golden",
    "GraphFile",
    "GraphMemory",
    "GraphVariant",
    "Manifest",
    "UnitLayer",
    "golden_batch",
]

FORMAT = 1
GRAPHS = ("probe.onnx", "predict.onnx", "saliency.onnx", "moments.onnx")
NEEDED_GRAPHS = GRAPHS[:2]  # without layers that have units there are no others
CUT_GRAPHS = ("prefix.onnx", "suffix.onnx")
TAIL_GRAPHS = ("body.onnx", "tail.onnx")
GRAPH_NAMES = (*GRAPHS, *CUT_GRAPHS, *TAIL_GRAPHS)
MAX_MANIFEST_BYTES = 4 << 20
MAX_GRAPH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class UnitLayer:
    """One layer whose output units (rows or channels) are shifted for the saliency.

    Attributes:
        parameter: Name of its weight, shape ``(n_units, ...)``.
        n_units: Output units or channels.
        groups: Groups of a convolution.
        shift_offset: Where its units lie in the ``shift`` input of ``saliency.onnx``.
        moment_offset: Where its input second moments lie in the output of ``moments.onnx``.
        n_moments: ``groups * prod(weight.shape[1:])``.
        is_output: The layer yields the logits, so its sensitivities are 1 and need no pass.
    """

    parameter: str
    n_units: int
    groups: int
    shift_offset: int
    moment_offset: int
    n_moments: int
    is_output: bool


@dataclass(frozen=True)
class Manifest:
    """An artifact's description.

    Attributes:
        model: Name of the architecture, ``lenet5`` or ``module:function``.
        input_shape: Shape of one sample, without the batch axis.
        n_classes: Number of logits.
        seed: Seed of the initial weights.
        sparsity: Target fraction of maskable weights to remove, ``0 <= sparsity < 1``.
        layout: The flat vector.
        units: Layers that the saliency shifts, in the order of the layout.
        graphs: Files with hashes.
        memory: Live sets of the graphs.
        golden: Known answer of the probe graph and of the predict graph.
        producer: Exporter name and version.
        variants: Graphs for particular machines, in any number; each has an entry in ``memory``.
        cut: Where ``prefix.onnx`` ends and ``suffix.onnx`` begins; None if the model has no such place.
        tail: The fully connected layers of ``tail.onnx``; None if the model does not end with any.
        work: What ``probe.onnx`` computes and moves; None in artifacts of older versions.
        stages: The layers of a network that is one chain; nothing for any other.
        structure: The whole network, if channels were removed from it before the export.
        sections: Where the network is cut for probes of more than two parts; None if it is not.
    """

    model: str
    input_shape: tuple[int, ...]
    n_classes: int
    seed: int
    sparsity: float
    layout: Layout
    units: tuple[UnitLayer, ...]
    graphs: tuple[GraphFile, ...]
    memory: tuple[GraphMemory, ...]
    golden: Golden
    producer: str
    variants: tuple[GraphVariant, ...] = ()
    cut: Cut | None = None
    tail: DenseTail | None = None
    work: GraphWork | None = None
    stages: tuple[Stage, ...] = ()
    structure: Structure | None = None
    sections: Sections | None = None

    def __post_init__(self) -> None:
        if not self.input_shape or any(n < 1 for n in self.input_shape) or math.prod(self.input_shape) > 1 << 26:
            raise ArtifactError(f"the manifest has the impossible input shape {self.input_shape}")
        if not 2 <= self.n_classes <= 1 << 20:
            raise ArtifactError(f"the manifest has {self.n_classes} classes")
        if not 0 <= self.seed < 1 << 64:
            raise ArtifactError(f"the manifest's seed {self.seed} is not an unsigned 64-bit number")
        if not 0.0 <= self.sparsity < 1.0:
            raise ArtifactError(f"the manifest's sparsity {self.sparsity} is not in [0, 1)")
        shift = moment = 0
        for unit in self.units:
            shape = self.layout.parameters[self.layout.position_of(unit.parameter)].shape
            if (
                unit.groups < 1
                or unit.n_units % unit.groups
                or shape[0] != unit.n_units
                or unit.n_moments != unit.groups * math.prod(shape[1:])
                or (unit.shift_offset, unit.moment_offset) != (shift, moment)
            ):
                raise ArtifactError(f"the unit layer {unit.parameter!r} does not match the layout")
            shift, moment = shift + unit.n_units, moment + unit.n_moments
        planned = {memory.name for memory in self.memory}
        names = [variant.file.name for variant in self.variants]
        if len(set(names)) < len(names) or not planned.issuperset(names):
            raise ArtifactError(f"of the variants {names}, two share a name or one has no memory plan")
        files = {graph.name for graph in self.graphs}
        if lacking := set(NEEDED_GRAPHS) - files:
            raise ArtifactError(f"the manifest lists no {' and no '.join(sorted(lacking))}")
        if self.cut is not None and not files.issuperset(CUT_GRAPHS):
            raise ArtifactError("the manifest has a cut without its graphs")
        if self.tail is not None and not files.issuperset(self.tail_graphs):
            raise ArtifactError("the manifest has a dense tail without its graphs")
        if self.cut is not None:
            self.cut.split(self.layout)
        if self.tail is not None:
            self.tail.cut.split(self.layout)
            self.tail.shapes(self.layout)
        if self.sections is not None:
            self.sections.check(self.layout, files)
        check_stages(self.stages, self.layout, self.input_shape, self.n_classes, files)
        if self.structure is not None:
            self.structure.check(self.layout, {unit.parameter: unit.n_units for unit in self.units})

    @property
    def tail_graphs(self) -> tuple[str, ...]:
        """The graph that yields the features of the dense tail, and that of the tail; nothing if there is no tail."""
        if self.tail is None:
            return ()
        return (CUT_GRAPHS if self.tail.cut == self.cut else TAIL_GRAPHS)[0], TAIL_GRAPHS[1]

    @property
    def model_layout(self) -> Layout:
        """The network's own parameters: :attr:`layout` without the heads of its stages."""
        return model_layout(self.layout, self.stages)

    @property
    def learns_locally(self) -> bool:
        """Whether every stage has a loss of its own."""
        return any(graph.name == stage_graph(0, "local") for graph in self.graphs)

    @property
    def n_units(self) -> int:
        """Length of the ``shift`` input."""
        return sum(u.n_units for u in self.units)

    @property
    def n_moments(self) -> int:
        """Length of the ``moments`` output."""
        return sum(u.n_moments for u in self.units)

    def graph(self, name: str) -> GraphFile:
        """The file called ``name``.

        Raises:
            ArtifactError: The artifact has none.
        """
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise ArtifactError(f"the artifact has no {name}")

    def memory_of(self, name: str) -> GraphMemory:
        """The memory plan of a graph.

        Raises:
            ArtifactError: The artifact has none.
        """
        for memory in self.memory:
            if memory.name == name:
                return memory
        raise ArtifactError(f"the artifact has no memory plan for {name}")

    def live_bytes(self, name: str, batch: int) -> int:
        """Tensor bytes of graph ``name`` at ``batch`` samples."""
        return self.memory_of(name).live_bytes(batch)

    def to_json(self) -> dict[str, Any]:
        """Plain data. What is absent (variants, cut, tail, ...) has no key, so older artifacts keep their bytes."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model,
            "input_shape": list(self.input_shape),
            "n_classes": self.n_classes,
            "seed": self.seed,
            "sparsity": self.sparsity,
            "layout": self.layout.to_json(),
            "layout_digest": self.layout.digest.hex(),
            "units": [
                {
                    "parameter": u.parameter,
                    "n_units": u.n_units,
                    "groups": u.groups,
                    "shift_offset": u.shift_offset,
                    "moment_offset": u.moment_offset,
                    "n_moments": u.n_moments,
                    "is_output": u.is_output,
                }
                for u in self.units
            ],
            "graphs": {g.name: {"sha256": g.sha256.hex(), "size": g.size} for g in self.graphs},
            "memory": {m.name: m.to_json() for m in self.memory},
            "golden": self.golden.to_json(),
            "producer": self.producer,
        }
        if self.variants:
            data["variants"] = {
                v.file.name: {
                    "graph": v.graph,
                    "machine": v.machine,
                    "onnxruntime": v.onnxruntime,
                    "block": v.block,
                    "weight_bytes": v.weight_bytes,
                    **({} if v.queries == 1 else {"queries": v.queries}),
                    "sha256": v.file.sha256.hex(),
                    "size": v.file.size,
                }
                for v in self.variants
            }
        if self.cut is not None:
            data["cut"] = self.cut.to_json()
        if self.tail is not None:
            data["tail"] = self.tail.to_json()
        if self.work is not None:
            data["work"] = self.work.to_json()
        if self.stages:
            data["stages"] = [stage.to_json() for stage in self.stages]
        if self.structure is not None:
            data["structure"] = self.structure.to_json()
        if self.sections is not None:
            data["sections"] = self.sections.to_json()
        return data

    def encode(self) -> bytes:
        """The bytes of ``manifest.json``."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Parse and check ``manifest.json``.

        Raises:
            ArtifactError: The bytes are no manifest of this format.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"the manifest has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"the manifest is not JSON: {error}") from None
        if not isinstance(raw, Mapping):
            raise ArtifactError("the manifest is not a JSON object")
        if raw.get("format") != FORMAT:
            raise ArtifactError(
                f"the artifact has format {raw.get('format')!r}, this fedzo reads {FORMAT}",
                hint="export it again with the fedzo version that serves the run",
            )
        try:
            manifest = _manifest(raw)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(f"the manifest is malformed: {error!r}") from None
        if manifest.layout.digest.hex() != raw.get("layout_digest"):
            raise ArtifactError("the manifest's layout does not have the digest that it names")
        return manifest


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def _count(value: object) -> int:
    number = _integer(value)
    if not 0 <= number < 1 << 48:
        raise ValueError(f"{number} is out of range")
    return number


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise TypeError("a text is missing or too long")
    return value


def _sha256(value: object) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise TypeError(f"{value!r} is no SHA-256")
    return bytes.fromhex(value)


def _manifest(raw: Mapping[str, Any]) -> Manifest:
    units = tuple(
        UnitLayer(
            _text(u["parameter"]),
            _count(u["n_units"]),
            _count(u["groups"]),
            _count(u["shift_offset"]),
            _count(u["moment_offset"]),
            _count(u["n_moments"]),
            bool(u["is_output"]),
        )
        for u in raw["units"]
    )
    graphs = []
    for name, entry in raw["graphs"].items():
        size = _count(entry["size"])
        if (
            not (name in GRAPH_NAMES or is_stage_graph(name) or is_section_graph(name))
            or not 0 < size <= MAX_GRAPH_BYTES
        ):
            raise ValueError(f"graph {name!r} of {size} bytes")
        graphs.append(GraphFile(name, _sha256(entry["sha256"]), size))
    memory = tuple(GraphMemory.from_json(_text(name), plan) for name, plan in raw["memory"].items() if plan)
    variants = []
    for name, entry in raw.get("variants", {}).items():
        size = _count(entry["size"])
        if not 0 < size <= MAX_GRAPH_BYTES:
            raise ValueError(f"variant {name!r} of {size} bytes")
        variants.append(
            GraphVariant(
                GraphFile(_text(name), _sha256(entry["sha256"]), size),
                _text(entry["graph"]),
                _text(entry["machine"]),
                _text(entry["onnxruntime"]),
                _count(entry["block"]),
                _count(entry["weight_bytes"]),
                _count(entry.get("queries", 1)),
            )
        )
    n_classes = _count(raw["n_classes"])
    return Manifest(
        model=_text(raw["model"]),
        input_shape=tuple(_count(n) for n in raw["input_shape"]),
        n_classes=n_classes,
        seed=_integer(raw["seed"]),
        sparsity=_finite(raw["sparsity"]),
        layout=Layout.from_json(raw["layout"]),
        units=units,
        graphs=tuple(graphs),
        memory=memory,
        golden=Golden.from_json(raw["golden"], n_classes),
        producer=_text(raw["producer"]),
        variants=tuple(variants),
        cut=Cut.from_json(raw["cut"]) if "cut" in raw else None,
        tail=DenseTail.from_json(raw["tail"]) if "tail" in raw else None,
        work=GraphWork.from_json(raw["work"]) if "work" in raw else None,
        stages=stages_from_json(raw.get("stages", [])),
        structure=Structure.from_json(raw["structure"]) if "structure" in raw else None,
        sections=Sections.from_json(raw["sections"]) if "sections" in raw else None,
    )
