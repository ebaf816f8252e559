"""docs/operations.md names metrics, limits and events that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedzo.broker_server import server
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker
from fedzo.broker_server.telemetry import health, http_endpoint
from fedzo.broker_server.telemetry.metrics import ServerMetrics
from fedzo.broker_server.telemetry.refusal_reasons import REASONS
from fedzo.cli import serve_unit
from fedzo.edge_runtime import agent, logs
from tests.broker_fixtures import needs_mosquitto

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_every_metric_is_known() -> None:
    known = {name for name, *_ in ServerMetrics().described()}
    named = set(re.findall(r"\bfedzo_[a-z_]+", PAGE)) - {"fedzo_queue_"}
    assert named
    assert {re.sub("_bucket$", "", name) for name in named} == known


def test_every_reason_is_explained() -> None:
    assert not [reason for reason in REASONS if f"`{reason}`" not in PAGE]


def test_the_examples_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")  # comes with mkdocs
    scrape, rules = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    assert scrape["scrape_configs"][0]["job_name"] == "fedzo"
    for rule in rules["groups"][0]["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")")


@pytest.mark.parametrize(
    "text",
    [
        f"| {server.INBOX_MESSAGES:,} messages, {server.INBOX_BYTES >> 20} MiB |",
        f"| {server.OUTGOING_MESSAGES:,} messages, {server.OUTGOING_BYTES >> 20} MiB; {server.MAX_INFLIGHT} of them in",
        f"| {server.BLOCKS_BYTES >> 20} MiB |",
        f"| {agent.INBOX_MESSAGES:,} messages, {agent.INBOX_BYTES >> 20} MiB |",
        f"| 1,000 messages, {agent.OUTGOING_BYTES >> 20} MiB, 4 of them in flight |",
        f"| {http_endpoint.MAX_CONNECTIONS}, {http_endpoint.REQUEST_S:g} s each |",
        f"| {logs.FILES + 1} of {logs.FILE_BYTES >> 20} MiB |",
        f"a log takes {(logs.FILES + 1) * logs.FILE_BYTES >> 20} MiB at most",
        f"has not for {health.LOOP_S:g} s",
        f"less than {health.FREE_BYTES >> 20} MiB free",
        f"a memory limit of {serve_unit.MEMORY_MAX_MIB >> 10} GiB",
        f"add the {(server.INBOX_BYTES + server.OUTGOING_BYTES) >> 20} MiB",
    ],
)
def test_the_limits_are_the_codes(text: str) -> None:
    assert text in PAGE


@needs_mosquitto
def test_the_limits_of_mosquitto_are_the_codes(tmp_path: Path) -> None:
    broker = MosquittoBroker(port=0)
    broker._write_files(tmp_path)
    config = (tmp_path / "mosquitto.conf").read_text()
    assert "max_queued_messages 100000\n" in config
    assert "max_inflight_messages 500\n" in config
    assert f"max_queued_bytes {256 << 20}\n" in config
    assert "| 100,000 messages and 256 MiB for an absent client, 500 in flight, 260 KiB a packet |" in PAGE


def test_every_event_has_a_name_on_the_page() -> None:
    events = set()
    for folder in ("broker_server", "edge_runtime", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            events |= set(re.findall(r'"event": "(\w+)"', text))
            events |= set(re.findall(r'_tell\(logging\.\w+, "(\w+)"', text))
    assert events >= {"announced", "refused", "report"}
    section = PAGE[PAGE.index("## Logs") : PAGE.index("## Stopping")]
    assert not [event for event in events if f"`{event}`" not in section]
