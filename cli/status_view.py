"""What `fedzo status` shows: lines for people, one object for machines, a live display on a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..broker_server.history.run_status import DeviceRow, RunFollower, RunStatus
from ..broker_server.telemetry.live_file import live_refusals, live_url
from ..broker_server.telemetry.scrape import LiveState, scrape
from ..edge_runtime.logs import CONTROL
from ..protocol.errors import ConfigError
from .output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["show_status"]

_COLUMNS = ("device", "state", "last report", "ago", "took", "peak RSS", "loss", "refused")
_COLOURS = {"refused": "red", "declined": "yellow", "waiting": "cyan", "reported": "green", "done": "green"}
Row = tuple[str, str]


def show_status(output: Output, path: Path, *, watch: bool, interval_s: float, most: int, url: str | None) -> None:
    """Show how a run stands.

    Args:
        output: Where to.
        path: Folder of the run.
        watch: Go on until it is done.
        interval_s: Time between two looks.
        most: Devices to list.
        url: Of the metrics endpoint; None for the one that the server noted.

    Raises:
        ConfigError: It is no folder of a run, or ``watch`` was asked for with JSON.
        ArtifactError: The journal is damaged.
    """
    if watch and output.json:
        raise ConfigError(
            "--watch updates a display, --json prints one object", hint="ask again and again: fedzo status RUN --json"
        )
    with RunFollower(path) as follower:
        if watch:
            _watch(output, follower, path, interval_s, most, url)
            return
        status = _poll(follower, path)
    live = _live(path, status, url)
    output.table(("run", status.run), _facts(status, live))
    if status.rows and most:
        output.table(_COLUMNS, [_cells(row) for row in status.rows[:most]])
    output.result({**_plain(status, most), "live": None if live is None else asdict(live)})


def _poll(follower: RunFollower, path: Path) -> RunStatus:
    """What the journal says, and who takes no part by what the server noted, while it runs."""
    status = follower.poll()
    refused = live_refusals(path) if status.server_pid is not None else {}
    if not refused:
        return status
    rows = [
        replace(row, state="refused") if row.name in refused and row.state == "idle" else row for row in status.rows
    ]
    rows.sort(key=lambda row: row.state != "refused")  # stable
    return replace(status, rows=tuple(rows), states=dict(Counter(row.state for row in rows)))


def _plain(status: RunStatus, most: int) -> dict[str, Any]:
    found = asdict(status)
    found["rows"] = found["rows"][:most]
    return found


def _live(path: Path, status: RunStatus, url: str | None) -> LiveState | None:
    """What the server says; the address that it noted counts only while it runs."""
    noted = live_url(path) if url is None and status.server_pid is not None else ""
    return scrape(url or noted) if url or noted else None


def _watch(output: Output, follower: RunFollower, path: Path, interval_s: float, most: int, url: str | None) -> None:
    """Until the run is done, or Ctrl-C: a stopped run may be resumed."""
    status = _poll(follower, path)
    if not output.interactive:
        last = ""
        while True:
            line = _line(status)
            if line != last:
                output.text(line)
                last = line
            if status.phase == "done":
                return
            time.sleep(interval_s)
            status = _poll(follower, path)
    from rich.live import Live

    before: tuple[float, LiveState | None] = time.monotonic(), None
    with Live(console=output.console, auto_refresh=False) as display:
        while True:
            live = _live(path, status, url)
            now = time.monotonic()
            rates = _rates(before, (now, live))
            display.update(_display(status, live, rates, most), refresh=True)
            if status.phase == "done":
                return
            before = now, live
            time.sleep(interval_s)
            status = _poll(follower, path)


def _rates(before: tuple[float, LiveState | None], after: tuple[float, LiveState | None]) -> tuple[float, float] | None:
    """Bytes a second in and out, between two looks."""
    (start, old), (end, new) = before, after
    if old is None or new is None or end <= start or new.bytes_in < old.bytes_in:
        return None
    return (new.bytes_in - old.bytes_in) / (end - start), (new.bytes_out - old.bytes_out) / (end - start)


def _line(status: RunStatus) -> str:
    accuracy = "" if status.accuracy is None else f", accuracy {status.accuracy:.4f}"
    return (
        f"{status.phase}: round {status.round}, update {status.updates}/{status.updates_planned}, "
        f"{status.answered} of {status.participants} reports{accuracy}"
    )


def _facts(status: RunStatus, live: LiveState | None, rates: tuple[float, float] | None = None) -> list[Row]:
    served = f"served by process {status.server_pid}" if status.server_pid else "nobody serves it"
    where = f"{status.phase} ({status.reason})" if status.reason else status.phase
    ago = _seconds(time.time() - status.last_at)
    rows = [
        ("state", f"{where}; {served}"),
        ("round", f"{status.round}; {status.answered} of {status.participants} devices answered"
                  f", quorum {status.quorum}" if status.participants else f"{status.round}"),
        ("updates", f"{status.updates} of {status.updates_planned}"),
        ("held-out accuracy", "not evaluated" if status.accuracy is None else f"{status.accuracy:.2%}"),
        ("loss in reports", "" if status.loss is None else f"{status.loss:.4f}"),
        ("devices", f"{status.devices}{_counts(status.states)}"),
        ("reports", f"{status.reports} accepted, {status.refused} refused{_counts(status.refusals)}"),
        ("pace", _pace(status)),
        ("journal", f"{_bytes(status.journal_bytes)}; newest entry {ago} ago"),
        ("weights digest", status.weights_digest or "none yet"),
    ]  # fmt: skip
    if live is not None:
        rows += _live_facts(live, rates)
    if not status.server_pid and status.phase != "done":
        rows.append(("go on with", f"fedzo serve --resume {status.folder}"))
    return rows


def _live_facts(live: LiveState, rates: tuple[float, float] | None) -> list[Row]:
    pace = "" if rates is None else f"; {_bytes(rates[0])}/s in, {_bytes(rates[1])}/s out"
    memory = f"{live.resident_mib:g} MiB, peak {live.peak_mib:g} MiB"
    return [
        ("broker", "connected" if live.is_connected else "no link"),
        ("devices say", ", ".join(f"{count} {state}" for state, count in live.devices.items())),
        ("MQTT traffic", f"{_bytes(live.bytes_in)} in, {_bytes(live.bytes_out)} out{pace}"),
        ("server memory", memory),
        ("queues", ", ".join(f"{name} {depth}" for name, depth in live.queues.items())),
        ("given up", ", ".join(f"{count} {reason}" for reason, count in live.dropped.items()) or "nothing"),
    ]


def _pace(status: RunStatus) -> str:
    if status.rounds_per_minute is None or status.reports_per_minute is None:
        return ""
    return f"{status.rounds_per_minute:.4g} rounds and {status.reports_per_minute:.4g} reports a minute"


def _counts(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in counts.items())})" if counts else ""


def _cells(row: DeviceRow) -> tuple[str, ...]:
    if row.round < 0:
        return row.name, row.state, "", "", "", "", "", str(row.refused or "")
    return (
        row.name,
        row.state,
        f"round {row.round}",
        "" if row.seen_s_ago is None else _seconds(row.seen_s_ago),
        _seconds(row.elapsed_ms / 1000),
        f"{row.peak_rss_mib:g} MiB",
        "" if row.mean_loss is None else f"{row.mean_loss:.4g}",
        str(row.refused or ""),
    )


def _seconds(value: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:.0f} {unit}"
    return f"{max(0.0, value):.3g} s"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _display(status: RunStatus, live: LiveState | None, rates: tuple[float, float] | None, most: int) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(status, live, rates):
        facts.add_row(Text(name, style="bold"), Text(value.translate(CONTROL)))
    bar = ProgressBar(total=max(1, status.updates_planned), completed=status.updates, width=60)
    facts.add_row(Text("", style="bold"), bar)
    parts: list[RenderableType] = [Text(f"run {status.run}", style="bold"), facts]
    if status.rows and most:
        table = Table(*_COLUMNS, box=None, padding=(0, 2), header_style="bold")
        for row in status.rows[:most]:
            table.add_row(*map(Text, _cells(row)), style=_COLOURS.get(row.state, ""))
        parts.append(table)
        if len(status.rows) > most:
            parts.append(Text(f"and {len(status.rows) - most} more devices", style="dim"))
    return Group(*parts)
