"""How well do K differences of losses estimate the gradient, and what does pruning change?

Scalars come from a device's own estimator and engine; the exact gradient of the same batch from automatic
differentiation. ``jvp`` are exact directional derivatives along the same directions, what differences of losses would
be without rounding and curvature. Everything is taken over the survivors of the mask, at the initial weights and after
some steps of backpropagation. ``captured`` is the squared length of the gradient's part along the estimate: how much
the batch's loss falls, to first order, along a step of unit length, squared.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.datasets.data import Batch
from ..edge_runtime.estimation.estimators import SteinEstimator
from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.storage.artifact import Artifact
from ..protocol.artifact.layout import initial_weights
from ..protocol.errors import ConfigError
from ..protocol.perturbation.directions import Directions
from ..protocol.perturbation.streams import Purpose, permutation
from ..protocol.pruning.mask import Mask
from .data import Images, load_images
from .experiment import Experiment
from .lab import combined, exported, gaussian_mask
from .metrics import cosine_squared, relative_error, slope
from .pictures import COLOURS
from .report import Report, Table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

SAMPLES = 2048  # behind the gradient of the data
FITTED_K = 256
ERRORS = (1, 2, 5, 10, 20, 50, 100)


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9, 0.95], help="of the masks")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256, 1024], help="directions")
    parser.add_argument("--families", nargs="+", default=["gaussian", "hadamard"], help="of directions")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100], help="of backpropagation before")
    parser.add_argument("--batch", type=int, default=16, help="samples behind a loss (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=2.0**-10, help="length of a perturbation")


def _estimates(directions: Directions, scalars: NDArray[np.float32], sizes: list[int]) -> list[NDArray[np.float64]]:
    """Gradient estimates of the first K scalars, for every K."""
    found, total, start = [], np.zeros(directions.size), 0
    for k in sizes:
        part = np.arange(start, k, dtype=np.int64)
        total = total + len(part) * combined(directions, 0, part, scalars[part]).astype(np.float64)
        found.append(total / k)
        start = k
    return found


def _one_mask(
    artifact: Artifact, mask: Mask, dense: NDArray[np.float32], images: Images, options: Namespace, seed: int
) -> list[dict[str, Any]]:
    from .backprop import directional_derivative, exact_gradient

    manifest, rows = artifact.manifest, []
    order = permutation(seed, Purpose.BATCH, 0, 0, len(images.x)).astype(np.int64)
    drawn, many = order[: options.batch], order[-SAMPLES:]
    batch = Batch(np.ascontiguousarray(images.x[drawn]), images.y[drawn])
    exact = exact_gradient(manifest, dense, batch.x, batch.y)[mask.kept]
    whole = exact_gradient(manifest, dense, images.x[many], images.y[many])[mask.kept]
    weights = np.ascontiguousarray(dense[mask.kept])
    for family in options.families:
        directions = Directions(family, seed, mask.n_survivors)
        positions = np.arange(max(options.k), dtype=np.int64)
        with Engine(artifact, mask, micro_batch=32) as engine:
            measured = SteinEstimator(directions, options.sigma).probe(engine, weights, batch, 0, positions)
        slopes = directions.project(0, positions, exact.astype(np.float32)).astype(np.float32)
        full = np.zeros(manifest.layout.size, np.float32)
        full[mask.kept] = directions.direction(0, 0, np.empty(mask.n_survivors, np.float32))
        forward_mode = directional_derivative(manifest, dense, full, batch.x, batch.y)
        stein = _estimates(directions, measured.values, options.k)
        jvp = _estimates(directions, slopes, options.k)
        for k, by_losses, by_slopes in zip(options.k, stein, jvp, strict=True):
            rows.append(
                {
                    "family": family,
                    "k": k,
                    "cos2": cosine_squared(by_losses, exact),
                    "cos2_jvp": cosine_squared(by_slopes, exact),
                    "relative_error": relative_error(by_losses, exact),
                    "relative_error_jvp": relative_error(by_slopes, exact),
                    "cos2_data": cosine_squared(by_losses, whole),
                    "batch_cos2_data": cosine_squared(exact, whole),
                    "gradient_norm": float(np.linalg.norm(exact)),
                    "captured": cosine_squared(by_losses, exact) * float(exact @ exact),
                    "jvp_check": abs(float(slopes[0]) / forward_mode - 1.0),
                }
            )
    return rows


def _one_seed(images: Images, options: Namespace, seed: int) -> list[dict[str, Any]]:
    from .backprop import trained

    rows = []
    with exported("lenet5", images.shape, images.n_classes, seed) as artifact:
        manifest = artifact.manifest
        initial = initial_weights(manifest.layout, manifest.seed)
        for sparsity in options.sparsities:
            mask = gaussian_mask(artifact, initial, sparsity, seed)
            for steps in options.steps:
                dense = trained(manifest, mask, initial, images.x, images.y, steps=steps, seed=seed)
                common = {
                    "data": images.name,
                    "seed": seed,
                    "steps": steps,
                    "sparsity": sparsity,
                    "survivors": mask.n_survivors,
                }
                rows += [{**common, **row} for row in _one_mask(artifact, mask, dense, images, options, seed)]
    return rows


def measure(options: Namespace) -> Report:
    """Every data set, seed, mask, state and family."""
    if sorted(set(options.k)) != options.k or options.k[0] < 1:
        raise ConfigError(f"the numbers of directions are {options.k}", hint="give them ascending, from 1")
    if options.batch < 1:
        raise ConfigError(f"the batch is {options.batch}, it must be 1 or more")
    sets = load_images(options.data)
    rows = [row for images in sets for seed in range(options.seeds) for row in _one_seed(images, options, seed)]
    settings = {
        "model": "lenet5",
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "sparsities": options.sparsities,
        "k": options.k,
        "families": options.families,
        "steps": options.steps,
        "batch": options.batch,
        "sigma": options.sigma,
        "one_sided": True,
        "backpropagation": "Adam, rate 1e-3, cosine, batch 64",
        "mask": "diagonal, 64 Gaussian inputs, one step",
    }
    report = Report.made(settings, rows, {})
    return Report.made(settings, rows, _figures(report))


def _median(report: Report, key: str, **wanted: object) -> float:
    found = [row[key] for row in report.rows if all(row[name] == value for name, value in wanted.items())]
    return float(np.median(found)) if found else math.nan


def _figures(report: Report) -> dict[str, float]:
    settings, figures = report.settings, {}
    k = FITTED_K if FITTED_K in settings["k"] else settings["k"][-1]
    for data in settings["data"]:
        for steps in settings["steps"]:
            for family in settings["families"]:
                where = {"data": data, "steps": steps, "family": family}
                name = f"{data}_{family}_step{steps}"
                sizes = [_median(report, "survivors", sparsity=s, **where) for s in settings["sparsities"]]
                for key, short in (("relative_error", "error"), ("cos2", "cos2")):
                    values = [_median(report, key, k=k, sparsity=s, **where) for s in settings["sparsities"]]
                    if len(sizes) > 1:
                        figures[f"{name}_{short}_slope_k{k}"] = slope(sizes, values)
                    for sparsity, value in zip(settings["sparsities"], values, strict=True):
                        figures[f"{name}_{short}_k{k}_sparsity{100 * sparsity:.0f}"] = value
                pairs = [row for row in report.rows if all(row[name] == value for name, value in where.items())]
                figures[f"{name}_cos2_over_jvp"] = float(np.median([row["cos2"] / row["cos2_jvp"] for row in pairs]))
                if {0.0, 0.8} <= set(settings["sparsities"]):
                    pruned, whole = (_median(report, "captured", k=k, sparsity=s, **where) for s in (0.8, 0.0))
                    figures[f"{name}_captured_80_over_dense_k{k}"] = pruned / whole
        checks = [row["jvp_check"] for row in report.rows if row["data"] == data]
        figures[f"{data}_jvp_check_worst"] = max(checks)
    return figures


def draw(report: Report, figure: Figure) -> None:
    """Error against survivors, and alignment against K, of the first data set and the last state."""
    settings = report.settings
    data, steps = settings["data"][0], settings["steps"][-1]
    error, aligned = figure.subplots(1, 2)
    family = settings["families"][0]
    for colour, k in zip(COLOURS, settings["k"], strict=False):
        where = {"data": data, "steps": steps, "family": family, "k": k}
        sizes = [_median(report, "survivors", sparsity=s, **where) for s in settings["sparsities"]]
        for key, style, label in (("relative_error", "o-", f"K = {k}"), ("relative_error_jvp", ":", "_")):
            values = [_median(report, key, sparsity=s, **where) for s in settings["sparsities"]]
            error.plot(sizes, values, style, color=colour, label=label)
    error.plot([], [], ":", color="black", label="exact slopes (JVP)")
    error.set_xlabel("surviving weights n")
    error.set_ylabel("relative error of the estimate")
    error.set_title(f"{family} directions, {data}, step {steps}")
    for colour, sparsity in zip(COLOURS, settings["sparsities"], strict=False):
        for one, style in zip(settings["families"], ("o--", "s-"), strict=False):
            where = {"data": data, "steps": steps, "sparsity": sparsity, "family": one}
            values = [_median(report, "cos2", k=k, **where) for k in settings["k"]]
            label = f"{100 * sparsity:.0f} % pruned" if one == settings["families"][-1] else "_"
            aligned.plot(settings["k"], values, style, color=colour, label=label)
    for one, style in zip(settings["families"], ("o--", "s-"), strict=False):
        aligned.plot([], [], style, color="black", label=one)
    aligned.set_xlabel("directions K")
    aligned.set_ylabel("squared cosine with the batch's gradient")
    for axes in (error, aligned):
        axes.set_xscale("log")
        axes.set_yscale("log")
    counts = [_median(report, "survivors", sparsity=s) for s in settings["sparsities"]]
    error.set_xticks(counts, [f"{n:,.0f}" for n in counts])
    error.set_yticks(ERRORS, map(str, ERRORS))
    error.minorticks_off()
    error.legend(loc="upper left")
    aligned.legend(loc="lower right")


def table(report: Report) -> Table:
    """Errors at one K, by data set, state, family and sparsity."""
    settings = report.settings
    k = FITTED_K if FITTED_K in settings["k"] else settings["k"][-1]
    keys = (
        ("relative error", "relative_error"),
        ("with exact slopes", "relative_error_jvp"),
        ("cos²", "cos2"),
        ("with exact slopes", "cos2_jvp"),
        ("cos², data", "cos2_data"),
        ("batch itself", "batch_cos2_data"),
        ("gradient norm", "gradient_norm"),
        ("captured", "captured"),
    )
    out = [["data", "step", "directions", "sparsity", "survivors", *(title for title, _ in keys)]]
    for data in settings["data"]:
        for steps in settings["steps"]:
            for family in settings["families"]:
                for sparsity in settings["sparsities"]:
                    where = {"data": data, "steps": steps, "family": family, "sparsity": sparsity, "k": k}
                    cells = [
                        data,
                        str(steps),
                        family,
                        f"{sparsity:.0%}",
                        f"{_median(report, 'survivors', **where):.0f}",
                    ]
                    out.append([*cells, *(text(_median(report, key, **where)) for _, key in keys)])
    return out


EXPERIMENT = Experiment(
    "error of the gradient estimate by sparsity and number of directions", add_options, measure, draw, table
)
