"""The documentation agrees with the code, and builds without a warning."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from struct import Struct

import pytest

from fedzo.protocol.perturbation import directions
from fedzo.protocol.wire import announcement_bytes, documents, messages, topics, transfers
from fedzo.protocol.wire.framing import MessageType
from tests.board_fixture import ROOT

PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "f32": "f", "f64": "d"}
HEADERS: dict[str, tuple[MessageType, Struct]] = {
    "Report": (MessageType.REPORT, messages._REPORT),
    "UpdateRecord": (MessageType.UPDATE, messages._UPDATE),
    "Receipt": (MessageType.RECEIPT, messages._RECEIPT),
    "BlobRequest": (MessageType.BLOB_REQUEST, transfers._BLOB_REQUEST),
    "BlobBlock": (MessageType.BLOB_BLOCK, transfers._BLOB_BLOCK),
    "LogRequest": (MessageType.LOG_REQUEST, transfers._LOG_REQUEST),
    "LogSlice": (MessageType.LOG_SLICE, transfers._LOG_SLICE),
    "SnapshotOffer": (MessageType.SNAPSHOT_OFFER, transfers._SNAPSHOT_OFFER),
    "Announcement": (MessageType.ANNOUNCEMENT, announcement_bytes._ANNOUNCEMENT),
}
DOCUMENTS = {cls.__name__: cls for cls in documents.Document.__subclasses__() if cls.__name__ not in HEADERS}


def section(title: str) -> str:
    """The text under a heading, to the next one."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert found, f"docs/protocol.md has no section {title}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The rows of the table in a text, without its heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_every_binary_message_is_described() -> None:
    assert {message_type for message_type, _ in HEADERS.values()} == set(MessageType)


@pytest.mark.parametrize("name", HEADERS)
def test_byte_tables_are_the_codes(name: str) -> None:
    message_type, header = HEADERS[name]
    text = section(name)
    assert f"Type {message_type.value}." in text
    layout, offset = "<", 0
    for start, kind, _ in rows(text):
        assert int(start) == offset
        code = CODES[kind] if kind in CODES else kind.removeprefix("bytes ") + "s"
        layout += code
        offset += Struct("<" + code).size
    assert layout == header.format


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_tables_are_the_codes(name: str) -> None:
    cls = DOCUMENTS[name]
    text = section(name)
    assert f"`kind`: `{cls.KIND}`." in text
    assert [row[0].strip("`") for row in rows(text)] == [field.name for field in dataclasses.fields(cls)]


def test_the_topic_table_is_the_codes() -> None:
    described = {row[0].strip("`"): (row[1], row[2].startswith("yes")) for row in rows(section("Topics"))}
    implemented = {}
    for channel in topics.Channel:
        text = topics.topic("f", channel, "dev").removeprefix("fedzo/v1/f/").replace("/dev/", "/DEV/")
        writer = "device" if channel in topics.FROM_DEVICE else "server"
        implemented[text] = (writer, channel in topics.RETAINED)
    assert described == implemented


def test_limits_are_the_codes() -> None:
    from fedzo.protocol.wire import framing as wire

    for limit in (
        wire.MAX_PAYLOAD_BYTES,
        wire.MAX_SCALARS,
        messages.MAX_SEGMENTS,
        messages.MAX_REPORT_BLOCKS,
        directions.MAX_BLOCKS,
        transfers.MAX_LOG_RECORDS,
    ):
        assert re.search(rf"\b{limit:,}\b", PROTOCOL), f"{limit:,} is not in docs/protocol.md"
    assert f"at most {transfers.MAX_BLOCK_BYTES >> 10} KiB" in section("BlobRequest")
    assert f"at most {documents.MAX_DOCUMENT_BYTES >> 10} KiB" in section("JSON documents")
    assert f"first byte is the version ({wire.VERSION})" in section("Binary messages")


def run(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_generated_pages_are_up_to_date() -> None:
    run("docs/generate.py", "--check")


def test_the_pages_build(tmp_path: Path) -> None:
    """Strictly: a dead link, a missing anchor or a page outside the navigation is an error."""
    run("-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "404"}
    assert {path.stem for path in tmp_path.glob("*.html")} == pages
    for path in tmp_path.rglob("*.html"):
        fetched = re.findall(r"(?:src|<link[^>]*href)=\"(https?:[^\"]*)\"", path.read_text(encoding="utf-8"))
        assert not fetched, f"{path.name} needs the network: {fetched}"
