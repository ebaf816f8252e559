"""Writes an artifact folder: the graphs without weights, and a manifest that describes them.

Two exports with the same arguments on the same machine give the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from ..protocol.artifact.golden_answer import GoldenPredictions
from ..protocol.artifact.graph_files import GraphFile, GraphVariant
from ..protocol.artifact.graph_work import GraphWork
from ..protocol.artifact.layout import Layout, initial_weights
from ..protocol.artifact.manifest import FORMAT, GRAPH_NAMES, Golden, GraphMemory, Manifest, UnitLayer, golden_batch
from ..protocol.artifact.placement import PLACEMENTS_KEY, encode_placements
from ..protocol.artifact.sections import is_section_graph
from ..protocol.artifact.stages import is_stage_graph
from ..protocol.artifact.structure import Structure
from ..protocol.errors import ArtifactError, ConfigError
from .blocked_layout import BlockedProbe
from .channel_scores import parameter_gains
from .folder_replacement import flush_folder, replace_folder
from .forward import ForwardGraph
from .graph_work import graph_work
from .graphs import ArtifactGraphs, build_graphs, with_sections
from .live_set import graph_memory, measured_sizes
from .models.registry import build_forward
from .narrow import ChannelSelection, narrow
from .probe_variants import VARIANTS, probe_variants
from .sections import find_sections
from .sessions import dense_feeds, run_graph

__all__ = ["export_artifact", "verify_artifact"]

MANIFEST = "manifest.json"
GOLDEN_BATCH = 8
GOLDEN_TOLERANCE = 1e-5  # losses of different CPUs differ by about 1e-7; a wrong kernel by far more
LOGIT_TOLERANCE = 1e-4  # single logits were seen to differ by 9e-6


def export_artifact(
    model: str,
    input_shape: tuple[int, ...],
    n_classes: int,
    sparsity: float,
    seed: int,
    out: Path,
    *,
    channels: ChannelSelection | None = None,
    local_heads: bool = False,
    sections: int = 2,
    overwrite: bool = False,
) -> Manifest:
    """Export a model.

    The folder appears at once and complete, or not at all: files are written to a folder beside it, flushed to disk,
    read back and checked, and then the folder is renamed.

    Args:
        model: Name of a built-in model, or ``module:function`` that returns a ``torch.nn.Module``.
        input_shape: Shape of one sample, without the batch axis.
        n_classes: Number of logits.
        sparsity: Target fraction of prunable weights to remove, ``0 <= sparsity < 1``.
        seed: Seed of the initial weights and of the golden batch, ``0 <= seed < 2**64``.
        out: Folder to make.
        channels: What whole channels to keep; None for all.
        local_heads: Give the stages heads of their own, for the estimators ``local`` and ``local-node``.
        sections: Cut the network into so many sections at most, for probes with the estimator ``split`` that start from
            what enters each; 2 for the one cut that every artifact has.
        overwrite: Replace ``out`` when it is an artifact or empty; any other folder is never touched.

    Returns:
        What was written.

    Raises:
        ConfigError: An argument is out of range, the model does not fit the input, or the folder cannot be written.
        ArtifactError: The written files are not what was meant to be written.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(
            f"sparsity is {sparsity}, it must be at least 0 and below 1", hint="0.9 removes nine weights of ten"
        )
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"the seed {seed} is not an unsigned 64-bit number")
    if local_heads and channels is not None and channels.keep < 1.0:
        raise ConfigError("local heads are not made for networks without some of their channels", hint="choose one")
    if local_heads and sections != 2:
        raise ConfigError("local heads are not made for networks in sections", hint="choose one")
    _check_target(out, overwrite)
    forward = build_forward(model, input_shape, n_classes, seed)

    def portable(forward: ForwardGraph) -> tuple[ArtifactGraphs, Manifest, dict[str, bytes]]:
        return _portable(forward, model, input_shape, n_classes, sparsity, seed, local_heads, sections)

    structure: Structure | None = None
    if channels is not None and channels.keep < 1.0:
        _, whole, whole_files = portable(forward)
        forward, structure = narrow(forward, whole, whole_files, channels)
    built, manifest, files = portable(forward)
    variants: tuple[GraphVariant, ...] = ()
    memory = manifest.memory
    # Estimators that train heads do not run the probe graph in rounds.
    for name, probe, queries in () if local_heads else probe_variants(forward, built):
        plan = _variant_memory(name, probe, built, input_shape)
        properties = _properties(name, model, built.layout, seed, sparsity, manifest.units, manifest.golden, plan)
        properties[PLACEMENTS_KEY] = encode_placements(probe.placements)
        files[name] = _encode(probe.model, properties)
        file = GraphFile(name, hashlib.sha256(files[name]).digest(), len(files[name]))
        kind = (probe.machine, probe.onnxruntime, probe.block, probe.weight_bytes, queries)
        variants = (*variants, GraphVariant(file, "probe.onnx", *kind))
        memory = (*memory, plan)
    manifest = replace(manifest, variants=variants, memory=memory, structure=structure)
    _write_folder(out, {**files, MANIFEST: manifest.encode()}, overwrite)
    return manifest


def _portable(
    forward: ForwardGraph,
    model: str,
    input_shape: tuple[int, ...],
    n_classes: int,
    sparsity: float,
    seed: int,
    local_heads: bool,
    sections: int,
) -> tuple[ArtifactGraphs, Manifest, dict[str, bytes]]:
    """The graphs for any machine, their description and their bytes."""
    built = build_graphs(forward, sparsity, local_heads=local_heads)
    manifest, files = _described(built, model, input_shape, n_classes, sparsity, seed)
    if sections != 2:
        gains = parameter_gains(manifest, files)
        built = with_sections(built, forward, *find_sections(forward, built.units, gains, sections), input_shape)
        manifest, files = _described(built, model, input_shape, n_classes, sparsity, seed)
    return built, manifest, files


def _described(
    built: ArtifactGraphs, model: str, input_shape: tuple[int, ...], n_classes: int, sparsity: float, seed: int
) -> tuple[Manifest, dict[str, bytes]]:
    memory = tuple(_memory(name, built, input_shape) for name in built.graphs)
    golden = _golden(built, input_shape, n_classes, seed)
    units = tuple(unit.layer for unit in built.units)
    files = {
        name: _encode(graph, _properties(name, model, built.layout, seed, sparsity, units, golden, plan))
        for (name, graph), plan in zip(built.graphs.items(), memory, strict=True)
    }
    manifest = Manifest(
        model=model,
        input_shape=input_shape,
        n_classes=n_classes,
        seed=seed,
        sparsity=sparsity,
        layout=built.layout,
        units=units,
        graphs=tuple(GraphFile(name, hashlib.sha256(data).digest(), len(data)) for name, data in files.items()),
        memory=memory,
        golden=golden,
        producer=f"fedzo {importlib.metadata.version('fedzo')}",
        cut=built.cut,
        tail=built.tail,
        work=_work(built, input_shape),
        stages=built.stages,
        sections=built.sections,
    )
    return manifest, files


def verify_artifact(folder: Path) -> Manifest:
    """Read an artifact back and check every file.

    Raises:
        ArtifactError: A file is missing, not the one that the manifest names, or no valid graph.
    """
    try:
        manifest = Manifest.decode((folder / MANIFEST).read_bytes())
        for graph in (*manifest.graphs, *(variant.file for variant in manifest.variants)):
            data = (folder / graph.name).read_bytes()
            if len(data) != graph.size or hashlib.sha256(data).digest() != graph.sha256:
                raise ArtifactError(f"{folder / graph.name} is not the file that the manifest names")
            model = onnx.load_from_string(data)
            onnx.checker.check_model(model, full_check=True)
            properties = {item.key: item.value for item in model.metadata_props}
            if properties.get("fedzo.layout_digest") != manifest.layout.digest.hex():
                raise ArtifactError(f"{folder / graph.name} was exported for another layout")
    except OSError as error:
        raise ArtifactError(f"the artifact {folder} cannot be read: {error.strerror or error}") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"the artifact {folder} holds an invalid graph: {error}") from error
    return manifest


def _memory(name: str, built: ArtifactGraphs, input_shape: tuple[int, ...]) -> GraphMemory:
    graph = built.graphs[name]
    return graph_memory(name, graph, measured_sizes(graph, lambda batch: built.zero_feeds(name, input_shape, batch)))


def _work(built: ArtifactGraphs, input_shape: tuple[int, ...]) -> GraphWork:
    name = "probe.onnx"
    graph = built.graphs[name]
    sizes = measured_sizes(graph, lambda batch: built.zero_feeds(name, input_shape, batch))
    return graph_work(graph, built.layout, built.units, sizes, 4 * math.prod(input_shape))


def _variant_memory(name: str, probe: BlockedProbe, built: ArtifactGraphs, input_shape: tuple[int, ...]) -> GraphMemory:
    def feeds(batch: int) -> dict[str, NDArray[np.generic]]:
        return {**probe.zero_weights(), **built.zero_feeds("probe.onnx", input_shape, batch)}

    return graph_memory(name, probe.model, measured_sizes(probe.model, feeds))


def _golden(built: ArtifactGraphs, input_shape: tuple[int, ...], n_classes: int, seed: int) -> Golden:
    x, y = golden_batch(input_shape, n_classes, seed, GOLDEN_BATCH)
    layout = built.model_layout
    feeds = {**dense_feeds(layout, initial_weights(layout, seed)), "x": x, "y": y}
    loss = float(run_graph(built.graphs["probe.onnx"], feeds)["loss_sum"]) / GOLDEN_BATCH
    logits = run_graph(built.graphs["predict.onnx"], feeds)["logits"]
    predictions = GoldenPredictions.of_logits(logits, LOGIT_TOLERANCE * max(1.0, float(np.abs(logits).max())))
    return Golden(seed, GOLDEN_BATCH, loss, GOLDEN_TOLERANCE * max(1.0, abs(loss)), predictions)


def _properties(
    name: str,
    model: str,
    layout: Layout,
    seed: int,
    sparsity: float,
    units: tuple[UnitLayer, ...],
    golden: Golden,
    plan: GraphMemory,
) -> dict[str, str]:
    return {
        "fedzo.format": str(FORMAT),
        "fedzo.graph": name.removesuffix(".onnx"),
        "fedzo.model": model,
        "fedzo.init_seed": str(seed),
        "fedzo.sparsity": repr(float(sparsity)),
        "fedzo.layout": _json(layout.to_json()),
        "fedzo.layout_digest": layout.digest.hex(),
        "fedzo.units": _json(
            [
                {"parameter": u.parameter, "n_units": u.n_units, "groups": u.groups, "is_output": u.is_output}
                for u in units
            ]
        ),
        "fedzo.golden": _json(golden.to_json()),
        "fedzo.plan": _json([list(pair) for pair in plan.envelope]),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _encode(graph: ModelProto, properties: dict[str, str]) -> bytes:
    """Bytes of a graph; its metadata is set last, when everything that it describes is known."""
    onnx.checker.check_model(graph, full_check=True)
    model = ModelProto()
    model.CopyFrom(graph)
    del model.graph.value_info[:]
    model.doc_string = ""
    helper.set_model_props(model, properties)
    return bytes(model.SerializeToString(deterministic=True))


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target folder that holds anything but an artifact to be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is no folder", hint="choose another folder")
    if not out.exists():
        return
    try:
        known = (*GRAPH_NAMES, *VARIANTS, MANIFEST)
        names = sorted(p.name for p in out.iterdir() if p.name not in known)
        foreign = [name for name in names if not (is_stage_graph(name) or is_section_graph(name))]
        empty = not any(out.iterdir())
    except OSError as error:
        raise ConfigError(f"the folder {out} cannot be read: {error.strerror or error}") from error
    if foreign:
        raise ConfigError(
            f"the folder {out} holds {foreign[0]!r}, which is no part of an artifact", hint="choose another folder"
        )
    if not overwrite and not empty:
        raise ConfigError(f"the folder {out} exists", hint="give --overwrite to replace the artifact in it")


def _write_folder(out: Path, files: dict[str, bytes], overwrite: bool) -> None:
    """Write ``files`` so that ``out`` is at no time half written."""
    fresh: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".new", dir=out.parent))
        fresh.chmod(0o755)
        for name, data in files.items():
            with (fresh / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        flush_folder(fresh)
        verify_artifact(fresh)
        _check_target(out, overwrite)
        replace_folder(fresh, out)
    except OSError as error:
        raise ConfigError(
            f"the artifact cannot be written to {out}: {error.strerror or error}",
            hint="check the path, its permissions and the free disk space",
        ) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
