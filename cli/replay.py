"""`fedzo replay`: the weights of a run out of its journal alone, checked on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .output import Output

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def replay(
        output: Output,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
        round_: Annotated[
            int | None, typer.Option("--round", metavar="N", min=1, help="End after this round [default: the last].")
        ] = None,
        recount: Annotated[
            bool, typer.Option("--recount", help="Also make every update and mask again out of the reports.")
        ] = False,
    ) -> None:
        """Rebuild the weights of any round from the journal alone, and check every digest on the way.

        Needs nothing but the run's folder: initial weights from the seed, the masks, and every update replayed. What
        the journal says of the weights is compared with what the replay gives; the first difference ends it with exit
        code 6. A server may write the journal meanwhile.

        Example:
            $ fedzo replay runs/lenet5-20260101-120000-1
            $ fedzo replay runs/lenet5-20260101-120000-1 --round 40 --recount --json
        """
        from ..broker_server.history.replay import open_run, replay_weights

        with output.progress("replaying the journal"), open_run(run) as (folder, journal, document):
            journal.check()
            found = replay_weights(journal, document, folder.artifact.manifest, round_, recount=recount)
        checked = ", ".join(f"{count} {kind}" for kind, count in sorted(found.checked.items()))
        rows: list[tuple[str, object]] = [
            ("round", f"{found.round} ({found.phase}{', the last' if found.is_last else ''})"),
            ("updates", found.updates),
            ("weights digest", found.weights_digest),
            ("log head", found.log_head),
            ("survivors", found.survivors),
            ("entries that agree", checked),
        ]
        if found.recounted is not None:
            rows.append(("made again from reports", found.recounted))
        others = sorted(name for name, same in found.ends.items() if not same)
        if found.ends:
            rows.append(("devices that ended with these weights", len(found.ends) - len(others)))
        if others:
            rows.append(("devices that ended with others", ", ".join(others)))
        output.table(("replayed", document.run), rows)
        output.result(
            {
                "run": document.run,
                "round": found.round,
                "phase": found.phase,
                "is_last": found.is_last,
                "updates": found.updates,
                "weights_digest": found.weights_digest,
                "log_head": found.log_head,
                "mask_sha256": found.mask_sha256,
                "survivors": found.survivors,
                "checked": dict(found.checked),
                "recounted": found.recounted,
                "devices_agree": len(found.ends) - len(others),
                "devices_disagree": others,
            }
        )
