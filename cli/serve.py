"""`fedzo serve`: run a federation, from enrolment to the last evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command import ConfigOption, ShowConfigOption, command
from .output import Output

__all__ = ["register"]

_TRAINING = "Training"
_ROUNDS = "Rounds"
_PRUNING = "Pruning"
_BROKER = "Broker"


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def serve(
        output: Output,
        artifact: Annotated[Path | None, typer.Argument(metavar="ARTIFACT", help="Folder of fedzo export.")] = None,
        config: ConfigOption = None,
        show: ShowConfigOption = False,
        resume: Annotated[
            Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run; its settings hold.")
        ] = None,
        runs: Annotated[Path | None, typer.Option("--runs", help="Where run folders lie [default: runs].")] = None,
        name: Annotated[str | None, typer.Option("--run", help="Run id [default: model and time].")] = None,
        test_data: Annotated[
            Path | None, typer.Option("--test-data", help="The server's own test set, scaled as the network sees it.")
        ] = None,
        seed: Annotated[int | None, typer.Option(help="Seed of directions and batches.")] = None,
        devices: Annotated[int | None, typer.Option(help="Devices to wait for.", rich_help_panel=_ROUNDS)] = None,
        quorum: Annotated[int | None, typer.Option(help="Reports that a round needs.", rich_help_panel=_ROUNDS)] = None,
        deadline: Annotated[
            float | None, typer.Option(help="Seconds that a round may take.", rich_help_panel=_ROUNDS)
        ] = None,
        enrol_deadline: Annotated[
            float | None, typer.Option(help="Seconds to wait for --devices.", rich_help_panel=_ROUNDS)
        ] = None,
        patience: Annotated[
            int | None, typer.Option(help="Deadlines without quorum before the run stops.", rich_help_panel=_ROUNDS)
        ] = None,
        evaluate_every: Annotated[
            int | None, typer.Option(help="Updates between evaluations; 0: at the end.", rich_help_panel=_ROUNDS)
        ] = None,
        rounds: Annotated[int | None, typer.Option(help="Updates to make.", rich_help_panel=_TRAINING)] = None,
        estimator: Annotated[
            str | None,
            typer.Option(
                help="stein: directions over all weights; split: many over the layers behind the cut; node: node "
                "perturbation of the fully connected layers.",
                rich_help_panel=_TRAINING,
            ),
        ] = None,
        k: Annotated[
            int | None, typer.Option(help="Directions per device and round.", rich_help_panel=_TRAINING)
        ] = None,
        tail_k: Annotated[
            int | None,
            typer.Option(help="split, node: scalars for the layers behind the cut.", rich_help_panel=_TRAINING),
        ] = None,
        repeats: Annotated[
            int | None, typer.Option(help="node: passes with fresh noise.", rich_help_panel=_TRAINING)
        ] = None,
        feedback: Annotated[
            float | None,
            typer.Option(help="node: part of what was not sent that counts next time.", rich_help_panel=_TRAINING),
        ] = None,
        directions: Annotated[
            str | None, typer.Option(help="hadamard, rademacher or gaussian.", rich_help_panel=_TRAINING)
        ] = None,
        assign: Annotated[
            str | None,
            typer.Option(help="dealt: disjoint directions; shared: the same ones.", rich_help_panel=_TRAINING),
        ] = None,
        sigma: Annotated[float | None, typer.Option(help="Size of a perturbation.", rich_help_panel=_TRAINING)] = None,
        two_sided: Annotated[
            bool | None, typer.Option("--two-sided/--one-sided", help="Kind of difference.", rich_help_panel=_TRAINING)
        ] = None,
        batch: Annotated[int | None, typer.Option(help="Samples behind one loss.", rich_help_panel=_TRAINING)] = None,
        optimiser: Annotated[
            str | None, typer.Option(help="adam, sgd, momentum or sign_momentum.", rich_help_panel=_TRAINING)
        ] = None,
        learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", rich_help_panel=_TRAINING)] = None,
        schedule: Annotated[str | None, typer.Option(help="cosine or constant.", rich_help_panel=_TRAINING)] = None,
        sparsity: Annotated[
            float | None, typer.Option(help="Weights to remove [default: the artifact's].", rich_help_panel=_PRUNING)
        ] = None,
        saliency_steps: Annotated[int | None, typer.Option(help="Scoring rounds.", rich_help_panel=_PRUNING)] = None,
        saliency_samples: Annotated[
            int | None, typer.Option(help="Inputs scored on, per device.", rich_help_panel=_PRUNING)
        ] = None,
        saliency_draws: Annotated[
            int | None, typer.Option(help="Whole-layer draws per layer; 4 for deep nets.", rich_help_panel=_PRUNING)
        ] = None,
        saliency_inputs: Annotated[
            str | None, typer.Option(help="gaussian (data-free) or data.", rich_help_panel=_PRUNING)
        ] = None,
        broker: Annotated[
            str | None, typer.Option(help="auto, mosquitto, embedded, or a URL.", rich_help_panel=_BROKER)
        ] = None,
        host: Annotated[
            str | None, typer.Option(help="Address that a managed broker listens on.", rich_help_panel=_BROKER)
        ] = None,
        port: Annotated[int | None, typer.Option(help="Its port; 0 for a free one.", rich_help_panel=_BROKER)] = None,
        federation: Annotated[
            str | None, typer.Option(help="Topic level; several federations share a broker.", rich_help_panel=_BROKER)
        ] = None,
        username: Annotated[str | None, typer.Option(help="For a broker by URL.", rich_help_panel=_BROKER)] = None,
        password_file: Annotated[
            Path | None, typer.Option(help="For a broker by URL; or FEDZO_PASSWORD.", rich_help_panel=_BROKER)
        ] = None,
        ca: Annotated[Path | None, typer.Option(help="CA of a mqtts:// broker.", rich_help_panel=_BROKER)] = None,
    ) -> None:
        """Serve a run: wait for devices, prune, train, evaluate. Ends by itself; a stopped run can be resumed.

        Every setting can also stand in a TOML file (--config) or in the environment (FEDZO_TRAINING_ROUNDS=500).

        Example:
            $ fedzo serve artifact --devices 8 --rounds 500 --k 64
            $ fedzo serve artifact --config run.toml --broker mqtts://broker.example:8883
            $ fedzo serve --resume runs/lenet5-20260101-120000-1
        """
        flags: dict[str, Any] = {
            "artifact": artifact,
            "resume": resume,
            "runs": runs,
            "run": name,
            "test_data": test_data,
            "seed": seed,
            "devices": devices,
            "quorum": quorum,
            "deadline_s": deadline,
            "enrol_deadline_s": enrol_deadline,
            "patience": patience,
            "evaluate_every": evaluate_every,
            "training.rounds": rounds,
            "training.estimator": estimator,
            "training.k": k,
            "training.tail_k": tail_k,
            "training.repeats": repeats,
            "training.feedback": feedback,
            "training.directions": directions,
            "training.assignment": assign,
            "training.sigma": sigma,
            "training.two_sided": two_sided,
            "training.batch": batch,
            "training.optimiser.name": optimiser,
            "training.learning_rate": learning_rate,
            "training.schedule": schedule,
            "sparsity": sparsity,
            "saliency.steps": saliency_steps,
            "saliency.samples": saliency_samples,
            "saliency.draws": saliency_draws,
            "saliency.inputs": saliency_inputs,
            "broker": broker,
            "host": host,
            "port": port,
            "federation": federation,
            "username": username,
            "password_file": password_file,
            "ca": ca,
        }
        from .serve_run import serve_run

        serve_run(output, flags, config, show=show)
