"""Imports the user's own model: ``module:function`` that returns a ``torch.nn.Module``.

The graph comes from torch's tracing exporter (``dynamo=False``): it writes opset 17 and IR 8 itself, where the newer
exporter writes opset 18 and has it converted down. Tracing records one path through the code, so the graph is compared
with the module at other batch sizes before it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, helper
from torch import Tensor, nn

from ..protocol.artifact.layout import Initialiser, Layout, Parameter
from ..protocol.errors import ArtifactError, ConfigError
from .adaptive_pools import PlainPools
from .forward import BATCH, OPSET, RESERVED_NAMES, ForwardGraph, float_value, new_model
from .passes.fold_constants import FoldConstants
from .passes.static_reshapes import StaticReshapes
from .quiet_stdout import quiet_stdout
from .sessions import run_every_value, run_graph
from .torch_refusals import cannot_export, cannot_run

__all__ = ["import_torch_model"]

TOLERANCE = 1e-4  # relative to the largest logit; torch and onnxruntime order their sums differently


@dataclass(frozen=True)
class _Trained:
    """A trained parameter: its name in the graph, and what the module itself holds."""

    name: str
    value: NDArray[np.float32]
    initialiser: Initialiser


def import_torch_model(reference: str, input_shape: tuple[int, ...], n_classes: int, seed: int) -> ForwardGraph:
    """Build the user's module under ``seed`` and turn it into a forward graph.

    The module is used in evaluation mode. Parameters with ``requires_grad`` that reach the logits are trained; the
    others and all buffers become constants. A trained parameter's first values come from the run's seed: the module's
    own constant where all its entries are equal, else normal with mean 0 and the standard deviation of the module's
    own entries. Nothing is written to stdout: what the user's code prints goes to stderr.

    Args:
        reference: ``package.module:function``; the function takes no arguments. The current folder is searched too.
        input_shape: Shape of one sample, without the batch axis.
        n_classes: Number of logits that the module must return.
        seed: Seed of torch's generator while the module is built.

    Raises:
        ConfigError: The function cannot be imported, does not return a module, or the module cannot be exported.
    """
    with quiet_stdout():
        return _import(reference, input_shape, n_classes, seed)


def _import(reference: str, input_shape: tuple[int, ...], n_classes: int, seed: int) -> ForwardGraph:
    module = _build(reference, seed)
    _refuse_batch_statistics(module, reference)
    trained = _trained(module, reference)
    size = 3 * int(np.prod(input_shape))
    x = torch.linspace(-1.0, 1.0, size).reshape(3, *input_shape)
    expected = _logits(reference, module, x, n_classes)
    atol = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not np.allclose(_logits(reference, module, x[2:], n_classes), expected[2:], 0.0, atol):
        raise ConfigError(
            f"{reference} computes something else for a sample alone than for the same sample in a batch",
            hint="every sample must be processed on its own",
        )
    graph = _to_forward(
        reference, _trace(reference, module, x[:2].flip(0) + 0.5), module, trained, input_shape, n_classes
    )
    feeds = {t.name: t.value for t in trained.values()}
    graph = _with_static_shapes(graph, {**feeds, "x": x.numpy()})
    for batch in (3, 1):
        logits = run_graph(graph, {**feeds, "x": x[:batch].numpy()})["logits"]
        if logits.shape != (batch, n_classes) or not np.allclose(logits, expected[:batch], 0.0, atol):
            raise ConfigError(
                f"the exported graph of {reference} does not compute what the module computes (batch of {batch})",
                hint="the module must not use inputs or parameters as Python numbers, nor branch on their values",
            )
    by_name = {t.name: t for t in trained.values()}
    used = [n for n in dict.fromkeys(name for node in graph.graph.node for name in node.input) if n in by_name]
    try:
        parameters = (
            Parameter(n, by_name[n].value.shape, by_name[n].value.ndim > 1, by_name[n].initialiser) for n in used
        )
        return ForwardGraph(graph, Layout(tuple(parameters)))
    except ArtifactError as error:
        raise ConfigError(f"{reference} cannot be exported: {error.message}") from error


def _build(reference: str, seed: int) -> nn.Module:
    """Import and call the user's function."""
    module_name, _, function_name = reference.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not function_name.isidentifier():
        raise ConfigError(f"{reference!r} is not of the form package.module:function")
    with _current_folder_on_path():
        try:
            namespace = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            itself = error.name == module_name or module_name.startswith(f"{error.name}.")
            hint = "run from the folder that holds it, or install it" if itself else ""
            raise ConfigError(f"{module_name} cannot be imported: {error}", hint=hint) from error
        except Exception as error:
            raise ConfigError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
        function = getattr(namespace, function_name, None)
        if not callable(function):
            close = difflib.get_close_matches(function_name, vars(namespace), n=1)
            raise ConfigError(
                f"{module_name} has no function {function_name!r}",
                hint=f"did you mean {module_name}:{close[0]}?" if close else "",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = function()
            except Exception as error:
                raise ConfigError(
                    f"{reference} failed: {type(error).__name__}: {error}", hint="it is called without arguments"
                ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{reference} returned {type(module).__name__}, not a torch.nn.Module")
    return module.cpu().eval()


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _refuse_batch_statistics(module: nn.Module, reference: str) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or getattr(layer, "running_mean", None) is not None:
            raise ConfigError(
                f"layer {name or 'itself'!r} of {reference} is a {type(layer).__name__} with batch statistics",
                hint="statistics of other samples do not exist on a board: use GroupNorm, or InstanceNorm without"
                " track_running_stats",
            )


def _trained(module: nn.Module, reference: str) -> dict[str, _Trained]:
    """The trained parameters by their name in the module."""
    found: dict[str, _Trained] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(
                f"parameter {name!r} of {reference} has no shape yet: its layer is a lazy one",
                hint="call the module once with a batch of the right shape before returning it",
            )
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name!r} of {reference} is {parameter.dtype}, not float32",
                hint="call .float() on the module",
            )
        value = parameter.detach().numpy().copy()
        unreserved = f"{name}.parameter" if name in RESERVED_NAMES else name
        found[name] = _Trained(unreserved, value, _initialiser(f"{name!r} of {reference}", value))
    if not found:
        raise ConfigError(f"{reference} has no parameter with requires_grad: there is nothing to train")
    return found


def _initialiser(name: str, value: NDArray[np.float32]) -> Initialiser:
    if not np.isfinite(value).all():
        raise ConfigError(f"parameter {name} holds values that are not finite")
    if (value == value.flat[0]).all():
        return Initialiser("constant", float(value.flat[0]))
    mean, deviation = float(value.mean(dtype=np.float64)), float(value.std(dtype=np.float64))
    if value.size >= 8 and abs(mean) > 2.0 * deviation:
        raise ConfigError(
            f"parameter {name} starts around {mean:.3g}, with a standard deviation of {deviation:.3g}",
            hint="first values come from a seed, as a constant or as normals around 0: make it constant, or freeze it",
        )
    return Initialiser("normal", float(np.float32(deviation)))


def _logits(reference: str, module: nn.Module, x: Tensor, n_classes: int) -> NDArray[np.float32]:
    try:
        with torch.no_grad():
            logits = module(x)
    except Exception as error:
        raise cannot_run(reference, module, x, error) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(x), n_classes):
        shape = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"{reference} returns {shape} a sample, not {n_classes} logits", hint="check --classes and the last layer"
        )
    return np.asarray(logits.numpy())


def _trace(reference: str, module: nn.Module, x: Tensor) -> ModelProto:
    # The exporter merges tensors that are equal, which would tie biases that only start equal: it sees other values.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.1, 0.2, generator=generator))
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, PlainPools(reference, module):
            file = Path(folder) / "traced.onnx"
            warnings.simplefilter("ignore")  # deprecation, and values that tracing freezes: both are checked for
            torch.onnx.export(
                module,
                (x,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=["x"],
                output_names=["logits"],
                dynamic_axes={"x": {0: BATCH}, "logits": {0: BATCH}},
                do_constant_folding=False,
                keep_initializers_as_inputs=True,
            )
            return onnx.load(file)
    except ConfigError:
        raise
    except Exception as error:
        raise cannot_export(reference, module, x, error) from error


def _to_forward(
    reference: str,
    traced: ModelProto,
    module: nn.Module,
    trained: Mapping[str, _Trained],
    input_shape: tuple[int, ...],
    n_classes: int,
) -> ModelProto:
    """Trained tensors become inputs, everything else stays a constant."""
    owner = {id(parameter): name for name, parameter in module.named_parameters()}
    rename = {
        alias: trained[owner[id(parameter)]].name
        for alias, parameter in module.named_parameters(remove_duplicate=False)
        if owner[id(parameter)] in trained
    }
    for node in traced.graph.node:
        if node.domain or any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise ConfigError(
                f"{reference} needs the operator {node.domain or 'with a sub-graph:'} {node.op_type} (at {node.name})",
                hint="write the layer with plain tensor operations",
            )
        node.doc_string = ""
        for position, name in enumerate(node.input):
            node.input[position] = rename.get(name, name)
    used = {name for node in traced.graph.node for name in node.input}
    inputs = [float_value("x", (BATCH, *input_shape))]
    inputs += [float_value(t.name, t.value.shape) for t in trained.values() if t.name in used]
    graph = helper.make_graph(
        traced.graph.node,
        "forward",
        inputs,
        [float_value("logits", (BATCH, n_classes))],
        [tensor for tensor in traced.graph.initializer if tensor.name not in rename],
    )
    return FoldConstants()(new_model(graph)).model


def _with_static_shapes(model: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> ModelProto:
    """Make reshapes constant and state the shape of every value, as running the graph shows it."""
    two, three = (run_every_value(model, {**feeds, "x": feeds["x"][:batch]}) for batch in (2, 3))
    shapes = [{name: value.shape for name, value in values.items()} for values in (two, three)]
    model = FoldConstants()(StaticReshapes(*shapes)(model).model).model
    for node in model.graph.node:
        for name in node.output:
            a, b = shapes[0].get(name, ()), shapes[1].get(name, ())
            if len(a) == len(b) and name != "logits" and name in two:
                dims = [_axis(m, n) for m, n in zip(a, b, strict=True)]
                kind = helper.np_dtype_to_tensor_dtype(two[name].dtype)
                model.graph.value_info.append(helper.make_tensor_value_info(name, kind, dims))
    return model


def _axis(two: int, three: int) -> int | str:
    """An axis by its sizes for batches of 2 and 3: a number, the batch, a multiple of it, or something else."""
    if two == three:
        return two
    factor = three - two
    if two != 2 * factor:
        return "unknown"
    return BATCH if factor == 1 else f"{BATCH}*{factor}"
