"""A range test and the run that takes its rate: two run folders, of which the first knows the second."""

from __future__ import annotations

import dataclasses

from ..edge_runtime.storage.durable import write_durably
from ..protocol.errors import ConfigError
from ..protocol.server_side.coordinator import Coordinator
from ..protocol.server_side.rate_finder import range_test_settings, with_found_rate
from ..protocol.settings import RunSettings
from ..protocol.wire.documents import RunDocument, parse
from .history.run_folder import NEXT_NAME, RunFolder

__all__ = ["SUFFIX", "follow_up", "plan_follow_up"]

SUFFIX = "-tune"


def plan_follow_up(folder: RunFolder, settings: RunSettings) -> RunSettings:
    """Make a new folder that of a range test.

    Args:
        folder: Its name ends with :data:`SUFFIX`; the run that follows has the name in front of it.
        settings: Of the run that follows, still without its rate.

    Returns:
        The settings of the range test.
    """
    run = folder.path.name.removesuffix(SUFFIX)
    write_durably(folder.path / NEXT_NAME, dataclasses.replace(folder.document(settings), run=run).encode())
    return range_test_settings(settings)


def follow_up(folder: RunFolder, coordinator: Coordinator) -> RunDocument | None:
    """The run that follows a range test which has come to its end; None if there is none, or it has not.

    Raises:
        ConfigError: No rate was found, or the folder does not say what follows.
        ProtocolError: What it says is damaged.
    """
    if coordinator.range_test is None or not coordinator.finished:
        return None
    try:
        run = parse(RunDocument, (folder.path / NEXT_NAME).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {folder.path / NEXT_NAME}: {error.strerror or error}") from error
    return dataclasses.replace(run, settings=with_found_rate(run.settings, coordinator.range_test))
