"""What seeds and scalars save: bytes of the project's own messages against whole vectors.

``report`` and ``update`` are encoded messages of a round, without topics and MQTT headers; ``sketch`` is the report of
as many scalars of a sketch, which travel as halves. ``vectors`` is what a device would send without the seeds: K
perturbations of all survivors as float32 beside its K scalars. ``weights`` is one float32 a survivor, what averaging of
weights or of gradients sends each way.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.artifact.layout import initial_weights
from ..protocol.perturbation.directions import round_coefficients
from ..protocol.perturbation.quantiles import gaussian_table
from ..protocol.perturbation.streams import Purpose, uint16s
from ..protocol.pruning.mask import threshold
from ..protocol.wire.messages import Report as Message
from ..protocol.wire.messages import ReportKind, UpdateRecord
from .experiment import Experiment
from .lab import DIGEST, exported
from .pictures import COLOURS
from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "report_bytes", "update_record_bytes"]

MODELS = ("lenet5", "resnet20", "resnet56")


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="for 3x32x32 and 10 classes")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.8, 0.9], help="of the masks")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 64, 1024], help="directions of a device")
    parser.add_argument("--devices", type=int, default=8, help="with directions of their own (default: %(default)s)")


def _slopes(n: int) -> NDArray[np.float32]:
    """Scalars as they come: with all the bits of a float32."""
    return gaussian_table()[uint16s(0, Purpose.CHANCE, 0, 0, n)] / np.float32(3.0)


def report_bytes(k: int, *, sketch: bool = False) -> int:
    """Length of an encoded report of ``k`` scalars in one block, slopes or a sketch, which has 11 bits a scalar."""
    scalars = _slopes(k)
    if sketch:
        scalars = (scalars / np.float32(2.0)).astype(np.float16).astype(np.float32)
    return len(Message(ReportKind.PROBE, bytes(4), 0, 1, 1, DIGEST, 0.0, k + 1, 0, 0, (scalars,)).encode())


def update_record_bytes(n: int) -> int:
    """Length of an encoded update of ``n`` coefficients that lie in one piece."""
    coefficients = round_coefficients(_slopes(n).astype(np.float64))
    return len(UpdateRecord(0, 0, 0.5, ((0, n),), coefficients, DIGEST, DIGEST).encode())


def measure(options: Namespace) -> Report:
    """Every model, sparsity and K."""
    rows: list[dict[str, Any]] = []
    for model in options.models:
        with exported(model, (3, 32, 32), 10, 0) as artifact:
            layout = artifact.manifest.layout
        # The mask by magnitude: how well its bits compress depends on the sparsity, hardly on the method.
        scores = np.abs(initial_weights(layout, 0))
        for sparsity in options.sparsities:
            mask = threshold(layout, scores, sparsity)
            weights = 4 * mask.n_survivors
            for k in options.k:
                up, down = report_bytes(k), update_record_bytes(options.devices * k)
                rows.append(
                    {
                        "model": model,
                        "parameters": layout.size,
                        "sparsity": sparsity,
                        "survivors": mask.n_survivors,
                        "mask": len(mask.encode()) if sparsity else 0,
                        "k": k,
                        "report": up,
                        "sketch": report_bytes(k, sketch=True),
                        "update": down,
                        "vectors": k * weights + up,
                        "weights": weights,
                        "vectors_over_report": (k * weights + up) / up,
                        "weights_over_report": weights / up,
                        "weights_over_round": 2 * weights / (up + down),
                    }
                )
    figures: dict[str, float] = {}
    for row in rows:
        if row["k"] == options.k[-1] or row["k"] == 64:
            name = f"{row['model']}_sparsity{100 * row['sparsity']:.0f}_k{row['k']}"
            for key in ("vectors_over_report", "weights_over_report", "weights_over_round"):
                figures[f"{name}_{key}"] = row[key]
    settings = {
        "models": options.models,
        "sparsities": options.sparsities,
        "k": options.k,
        "devices": options.devices,
        "assignment": "dealt",
        "seeds": [0],
    }
    return Report.made(settings, rows, figures)


def draw(report: Report, figure: Figure) -> None:
    """Bytes up against K, a model a panel."""
    models, sparsities = report.settings["models"], report.settings["sparsities"]
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        mine = [row for row in report.rows if row["model"] == model]
        for colour, sparsity in zip(COLOURS, sparsities, strict=False):
            rows = [row for row in mine if row["sparsity"] == sparsity]
            ks, label = [row["k"] for row in rows], "_" if panel is not panels[0] else f"{100 * sparsity:.0f} % pruned"
            panel.plot(ks, [row["vectors"] for row in rows], "s--", color=colour)
            panel.plot(ks, [row["weights"] for row in rows], ":", color=colour, label=label)
        rows = [row for row in mine if row["sparsity"] == sparsities[0]]
        ks = [row["k"] for row in rows]
        panel.plot(ks, [row["report"] for row in rows], "o-", color="black")
        panel.set_title(f"{model}, {mine[0]['parameters']:,} weights")
        panel.set_xlabel("directions K of a device")
        panel.set_xscale("log")
        panel.set_yscale("log")
    panels[0].plot([], [], "o-", color="black", label="report: scalars")
    panels[0].plot([], [], "s--", color="grey", label="K vectors")
    panels[0].plot([], [], ":", color="grey", label="weights, once")
    panels[0].set_ylabel("bytes up, a device and round")
    figure.legend(loc="outside lower center", ncols=6)


def table(report: Report) -> Table:
    """All rows, with ratios."""
    out = [
        [
            "model",
            "sparsity",
            "K",
            "report",
            "of a sketch",
            "update",
            "mask, once",
            "K vectors",
            "weights",
            "vectors / report",
            "weights / report",
        ]
    ]
    for row in report.rows:
        sizes = [f"{row[key]:,}" for key in ("report", "sketch", "update", "mask", "vectors", "weights")]
        ratios = [f"{row['vectors_over_report']:,.0f}", f"{row['weights_over_report']:,.1f}"]
        out.append([row["model"], f"{row['sparsity']:.0%}", str(row["k"]), *sizes, *ratios])
    return out


EXPERIMENT = Experiment(
    "bytes of seeds and scalars against whole vectors", add_options, measure, draw, table, (9.0, 3.7)
)
