"""`fedzo plan`: which boards an artifact fits on; `fedzo profile`: what it really needs, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import command
from .output import Output
from .profiles import names

if TYPE_CHECKING:
    from ..edge_runtime.planning.board_plan import BoardPlan, PhasePlan, RunSizes
    from ..hardware_profiles import Profile
    from ..protocol.artifact.manifest import Manifest
    from ..protocol.artifact.structure import Structure

__all__ = ["register"]

_ALL = "all"
_BATCH_HELP = "Samples behind one loss; that of fedzo serve by default."
_SAMPLES_HELP = "Inputs that are scored; those of fedzo serve by default."
_Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of fedzo export.")]
_Batch = Annotated[int | None, typer.Option(min=1, help=_BATCH_HELP)]
_Samples = Annotated[int | None, typer.Option("--saliency-samples", min=1, help=_SAMPLES_HELP)]
_Sparsity = Annotated[float | None, typer.Option(min=0, help="Of the run; the artifact's by default.")]
_Fill = Annotated[str | None, typer.Option(help="Of the run: zero, or init, which reads all weights.")]
_Pruning = Annotated[
    str | None, typer.Option(help="Of the run: boards score only for diagonal and ntk-sap, not for the others.")
]
_Estimator = Annotated[
    str | None,
    typer.Option(
        help="Of the run: those with several graphs keep them loaded where there is room. "
        "That of fedzo serve by default, local for an artifact with local heads."
    ),
]
_MicroBatch = Annotated[int | None, typer.Option(min=1, help="Samples of one forward pass; what fits by default.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    command(app, "plan")(plan_boards)
    command(app, "profile")(profile_board)


def plan_boards(
    output: Output,
    artifact: _Artifact,
    profile: Annotated[str, typer.Option(metavar="NAME", help="A board, or all.", autocompletion=names)] = _ALL,
    budget_mib: Annotated[
        float | None, typer.Option("--budget-mib", metavar="MIB", min=1, help="Instead of the profile's.")
    ] = None,
    batch: _Batch = None,
    samples: _Samples = None,
    sparsity: _Sparsity = None,
    fill: _Fill = None,
    pruning: _Pruning = None,
    estimator: _Estimator = None,
    micro_batch: _MicroBatch = None,
) -> None:
    """Say whether an artifact fits on a board, with which micro-batch, and what stays free. Nothing is loaded or run.

    Where channels were removed at the export, RAM saved is that of the portable graphs without micro-batches,
    against the whole network.

    Peaks are those of the whole fedzo-device process. The time is that of one loss of the batch; it comes out of rates
    in the profile, and no board was timed: take it for the order of magnitude. Exit code 4 if the one board that was
    named is too small.

    Example:
        $ fedzo plan artifact --profile all
        $ fedzo plan artifact --profile rpi-zero-2w --batch 64
        $ fedzo plan artifact --profile rpi-zero-2w --budget-mib 70 --pruning magnitude
        $ fedzo plan artifact --profile rpi-zero-2w --estimator node
    """
    from ..edge_runtime.planning.board_plan import plan_board
    from ..edge_runtime.storage.artifact import load_artifact
    from ..hardware_profiles import list_profiles, load_profile

    manifest = load_artifact(artifact).manifest
    _check_estimator(manifest, estimator)
    boards = list_profiles() if profile == _ALL else [load_profile(profile)]
    plans: list[tuple[Profile, BoardPlan]] = []
    for board in boards:
        sizes = _sizes(board, batch, samples, sparsity, micro_batch, manifest, fill, pruning, estimator)
        plans.append((board, plan_board(manifest, budget_mib or board.ram_budget_mib, sizes)))
    times = [_query_s(manifest, board, plan, batch) for board, plan in plans]
    saved = [_saved_mib(manifest, board, batch, samples, sparsity, fill, pruning) for board in boards]
    columns: tuple[str, ...] = (
        "board",
        "budget MiB",
        "fits",
        "micro-batch",
        "peak MiB",
        "slack scoring",
        "slack training",
        "query ms",
        "graphs",
    )
    if manifest.structure is not None:
        columns = (*columns, "RAM saved MiB")
    rows = []
    for (board, plan), seconds, less in zip(plans, times, saved, strict=True):
        slack = {phase.phase: f"{phase.slack_mib:.1f}" for phase in plan.phases}
        peak = f"{plan.peak.memory.planned_peak_mib:.1f}"
        micro = min(phase.memory.micro_batch for phase in plan.phases) if plan.fits else ""
        shown = "" if seconds is None or not plan.fits else f"{1e3 * seconds:.3g}"
        stays = any(phase.memory.keeps_graphs for phase in plan.phases)
        graphs = ("stay loaded" if stays else "one at a time") if plan.fits else ""
        cells: tuple[object, ...] = (slack.get("scoring", ""), slack["training"], shown, graphs)
        cells = cells if less is None else (*cells, f"{less:.1f}")
        rows.append((board.name, plan.budget_mib, "yes" if plan.fits else "no", micro, peak, *cells))
    output.table(columns, rows)
    described = [_board(*each, seconds) for each, seconds in zip(plans, times, strict=True)]
    structure: dict[str, Any] | None = None
    if manifest.structure is not None:
        described = [{**board, "ram_saved_mib": less} for board, less in zip(described, saved, strict=True)]
        structure = _structure(manifest.structure, manifest)
        output.text(
            f"{structure['channels']} of {structure['whole_channels']} channels ({structure['scores']}),"
            f" {structure['parameters']} of {structure['whole_parameters']} parameters"
        )
    output.result({"model": manifest.model, "boards": described, **({"structure": structure} if structure else {})})
    if profile != _ALL:
        plans[0][1].check()


def profile_board(
    output: Output,
    artifact: _Artifact,
    profile: Annotated[str, typer.Option(metavar="NAME", help="A board.", autocompletion=names)],
    budget_mib: Annotated[
        float | None, typer.Option("--budget-mib", metavar="MIB", min=1, help="Instead of the profile's.")
    ] = None,
    batch: _Batch = None,
    samples: _Samples = None,
    sparsity: _Sparsity = None,
    fill: _Fill = None,
    pruning: _Pruning = None,
    estimator: _Estimator = None,
    micro_batch: _MicroBatch = None,
) -> None:
    """Run an artifact on this machine under the budget of a board: what was planned, and what was measured.

    The engine runs in a process of its own, its tensors under the plan's limit; the peak is taken phase by phase.
    Beside it stands one step of backpropagation by torch on the same batch, if torch is installed. Times are this
    machine's, measured and predicted from a short calibration of it; fedzo plan predicts the board's.

    Example:
        $ fedzo profile artifact --profile rpi-zero-2w --batch 64
        $ fedzo profile artifact --profile rpi-zero-2w --estimator node
    """
    import importlib.util

    from ..edge_runtime.planning.board_plan import plan_board
    from ..edge_runtime.planning.child import answer_of
    from ..edge_runtime.storage.artifact import load_artifact
    from ..hardware_profiles import load_profile
    from ..protocol.errors import FedzoError

    board, manifest = load_profile(profile), load_artifact(artifact).manifest
    _check_estimator(manifest, estimator)
    sizes = _sizes(board, batch, samples, sparsity, micro_batch, manifest, fill, pruning, estimator)
    limit = budget_mib or board.ram_budget_mib
    plan_board(manifest, limit, sizes).check()
    arguments = [str(artifact), "--budget-mib", str(limit), "--batch", str(sizes.batch)]
    arguments += ["--samples", str(sizes.samples), "--threads", str(sizes.threads), "--tensors"]
    arguments += ["--variant"] if any(variant.machine != "any" for variant in sizes.variants) else []
    given: tuple[tuple[str, object], ...] = (("--sparsity", sparsity), ("--micro-batch", micro_batch), ("--fill", fill))
    given += (("--pruning", pruning), ("--estimator", sizes.estimator))
    for name, value in given:
        arguments += [] if value is None else [name, str(value)]
    measured = answer_of("fedzo.edge_runtime.planning.measure", arguments)
    torch: dict[str, Any] | None = None
    if importlib.util.find_spec("torch") is None:
        output.say("torch is not installed, so there is no step of backpropagation to compare with")
    else:
        try:
            torch = answer_of("fedzo.exporter.backprop_step", [str(artifact), "--batch", str(sizes.batch)])
        except FedzoError as error:
            output.warn(f"no step of backpropagation to compare with: {error.message}")
    predicted = measured["predicted_query_s"]
    rows: list[tuple[object, ...]] = [
        (
            phase["phase"],
            phase["micro_batch"],
            f"{phase['planned_mib']:.1f}",
            f"{phase['measured_mib']:.1f}",
            f"{phase['anonymous_mib']:.1f}",
            f"{phase['planned_tensors_mib']:.2f}",
            "" if phase["tensors_mib"] is None else f"{phase['tensors_mib']:.2f}",
            "" if phase["query_s"] is None else f"{1e3 * phase['query_s']:.3g}",
            "" if phase["query_s"] is None or predicted is None else f"{1e3 * predicted:.3g}",
        )
        for phase in measured["phases"]
    ]
    if torch is not None:
        rows.append(("torch SGD step", sizes.batch, "", f"{torch['peak_mib']:.1f}", *[""] * 5))
    columns = ("phase", "micro-batch", "planned MiB", "measured MiB", "without code MiB", "planned tensors MiB")
    output.table((*columns, "tensors MiB", "query ms", "predicted ms"), rows)
    output.text(
        f"peak {measured['peak_mib']:.1f} MiB of {limit:g}, {measured['floor_mib']:.1f} before a graph is loaded"
    )
    if sizes.estimator != "stein":  # that one changes graphs at an evaluation only
        loading = "graphs stay loaded" if measured["phases"][-1]["keeps_graphs"] else "one graph at a time"
        output.text(f"estimator {sizes.estimator}: {loading}")
    ratio = None
    if torch is not None:
        ratio = torch["peak_mib"] / measured["peak_mib"]
        output.text(f"a torch step of batch {sizes.batch} takes {ratio:.1f} times as much")
    answer = {"profile": board.name, "estimator": sizes.estimator, **measured}
    output.result({**answer, "torch": torch, "torch_over_ours": ratio})


def _check_estimator(manifest: Manifest, estimator: str | None) -> None:
    """Refuse one that the artifact has no graphs for, as fedzo serve does."""
    from ..protocol.perturbation.blocks import blocks_of
    from ..protocol.pruning.mask import Mask
    from ..protocol.settings import TrainingSettings

    if estimator is not None:
        training = TrainingSettings(estimator=estimator)  # type: ignore[arg-type]  # any text, until it is checked
        blocks_of(training, manifest, Mask.dense(manifest.layout))


def _sizes(
    board: Profile,
    batch: int | None,
    samples: int | None,
    sparsity: float | None,
    micro_batch: int | None,
    manifest: Manifest,
    fill: str | None,
    pruning: str | None,
    estimator: str | None = None,
) -> RunSizes:
    from ..edge_runtime.planning.board_plan import RunSizes
    from ..protocol.pruning.mask_choice import check_pruning
    from ..protocol.settings import RunSettings, SaliencySettings, TrainingSettings

    usual = RunSizes()
    estimator = estimator or ("local" if manifest.learns_locally else usual.estimator)
    removed = manifest.sparsity if sparsity is None else sparsity
    settings = RunSettings(  # which refuses what fedzo serve would
        sparsity=removed,
        fill=fill or usual.fill,  # type: ignore[arg-type]  # any text, until it is checked
        saliency=SaliencySettings(method=pruning or usual.pruning),  # type: ignore[arg-type]  # likewise
        training=TrainingSettings(estimator=estimator),  # type: ignore[arg-type]  # likewise
    )
    check_pruning(manifest, settings)
    # Which of its kind a board would take is not known here; they differ little. A device asks its processor.
    own = {v.queries > 1: v for v in reversed(manifest.variants) if v.machine == board.machine}
    variants = tuple(own[batched] for batched in (False, True) if batched in own)
    if True not in own:
        variants += tuple(v for v in manifest.variants if v.machine == "any")[:1]
    return RunSizes(
        batch or usual.batch,
        samples or usual.samples,
        sparsity,
        board.threads,
        micro_batch,
        variants=variants,
        fill=settings.fill,
        pruning=settings.saliency.method,
        estimator=settings.training.estimator,
    )


def _saved_mib(
    manifest: Manifest,
    board: Profile,
    batch: int | None,
    samples: int | None,
    sparsity: float | None,
    fill: str | None,
    pruning: str | None,
) -> float | None:
    """What the removed channels save at the peak; None if none were removed."""
    from ..edge_runtime.planning.board_plan import plan_board
    from ..protocol.artifact.whole_network import whole_network

    if manifest.structure is None:
        return None
    sizes = _sizes(board, batch, samples, sparsity, None, manifest, fill, pruning)
    sizes = dataclasses.replace(sizes, variants=())
    unlimited_mib = 1e6  # so that both take the whole batch at once
    whole, own = (plan_board(network, unlimited_mib, sizes) for network in (whole_network(manifest), manifest))
    return whole.peak.memory.planned_peak_mib - own.peak.memory.planned_peak_mib


def _structure(structure: Structure, manifest: Manifest) -> dict[str, Any]:
    return {
        "scores": structure.scores,
        "keep": structure.keep,
        "channels": sum(len(layer.kept) for layer in structure.layers),
        "whole_channels": sum(layer.n_units for layer in structure.layers),
        "parameters": manifest.layout.size,
        "whole_parameters": structure.parameters,
        "layers": {layer.parameter: [len(layer.kept), layer.n_units] for layer in structure.layers},
    }


def _query_s(manifest: Manifest, board: Profile, plan: BoardPlan, batch: int | None) -> float | None:
    from ..edge_runtime.planning.board_plan import RunSizes
    from ..edge_runtime.planning.calibration import board_rates, predicted_query_s

    rates, training = board_rates(board), plan.phases[-1].memory
    if manifest.work is None or rates is None:
        return None
    return predicted_query_s(
        manifest.work,
        rates,
        batch=batch or RunSizes().batch,
        micro_batch=training.micro_batch,
        threads=board.threads,
    )


def _board(board: Profile, plan: BoardPlan, query_s: float | None) -> dict[str, Any]:
    return {
        "profile": board.name,
        "title": board.title,
        "budget_mib": plan.budget_mib,
        "threads": board.threads,
        "fits": plan.fits,
        "planned_peak_mib": plan.peak.memory.planned_peak_mib,
        "predicted_query_s": query_s,
        "phases": {phase.phase: _phase(phase) for phase in plan.phases},
    }


def _phase(phase: PhasePlan) -> dict[str, Any]:
    memory = phase.memory
    return {
        "fits": not phase.refusal,
        "micro_batch": memory.micro_batch,
        "survivors": phase.survivors,
        "planned_peak_mib": memory.planned_peak_mib,
        "slack_mib": phase.slack_mib,
        "process_mib": memory.process_mib,
        "code_mib": memory.code_mib,
        "session_mib": memory.session_mib,
        "feeds_mib": memory.feeds_mib,
        "live_mib": memory.live_mib,
        "margin_mib": memory.margin_mib,
        "kept_mib": memory.kept_mib,
    }
