"""JSON documents: golden payloads, round trips, and no bytes that do anything but raise ProtocolError."""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import (
    MAX_DOCUMENT_BYTES,
    MAX_LINE,
    Announcement,
    Document,
    Hello,
    Order,
    Presence,
    RunDocument,
    ServerPresence,
    pack_participants,
    parse,
    unpack_participants,
)
from tests.protocol.golden.message_cases import DOCUMENTS, PAYLOADS
from tests.protocol.strategies import documents

GOLDEN: dict[str, str] = json.loads(PAYLOADS.read_text(encoding="utf-8"))["documents"]
KINDS: dict[str, type[Document]] = {
    kind.KIND: kind
    for kind in Document.__subclasses__()
    if kind.KIND != Announcement.KIND  # which is binary
}


def refuse(kind: type[Document], payload: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        parse(kind, payload)
    caught.value.message.encode()  # It is logged and may be journalled: no lone surrogate may survive in it.
    return caught.value.message


def test_every_document_has_a_golden_payload() -> None:
    assert set(GOLDEN) == set(DOCUMENTS) == set(KINDS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_payloads(name: str) -> None:
    payload = GOLDEN[name].encode()
    assert DOCUMENTS[name].encode() == payload
    assert parse(KINDS[name], payload) == DOCUMENTS[name]


@given(document=documents)
def test_round_trip(document: Document) -> None:
    payload = document.encode()
    assert len(payload) <= MAX_DOCUMENT_BYTES
    found = parse(type(document), payload)
    assert found == document
    assert found.encode() == payload


@pytest.mark.parametrize("name", GOLDEN)
def test_every_truncation_is_refused(name: str) -> None:
    payload = GOLDEN[name].encode()
    for length in range(len(payload)):
        refuse(KINDS[name], payload[:length])


@pytest.mark.parametrize("name", GOLDEN)
def test_other_documents_are_refused(name: str) -> None:
    for other in KINDS.values():
        if name != other.KIND:
            assert "not a" in refuse(other, GOLDEN[name].encode())


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys, nested ones included."""
    found = []
    for key, item in value.items():
        found.append((*path, key))
        if isinstance(item, dict):
            found += leaves(item, (*path, key))
    return found


def changed(data: dict[str, Any], path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> bytes:
    """The document with one key changed in place."""
    copy = json.loads(json.dumps(data))
    place = copy
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return json.dumps(copy).encode()


def put(value: Any, place: dict[str, Any], key: str) -> None:
    place[key] = value


def read(settings: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, settings)


PATHS = [(name, path) for name, text in GOLDEN.items() for path in leaves(json.loads(text))]


@pytest.mark.parametrize(("name", "path"), PATHS, ids=[f"{name}:{'.'.join(path)}" for name, path in PATHS])
def test_a_key_that_is_missing_or_of_another_type_is_refused(name: str, path: tuple[str, ...]) -> None:
    data, kind = json.loads(GOLDEN[name]), KINDS[name]
    shorter = changed(data, path, lambda place, key: place.pop(key))
    if path[0] == "settings" and len(path) > 1:  # A run that began before the setting was there goes on.
        found, default = parse(kind, shorter), RunSettings()
        assert isinstance(found, RunDocument)
        assert read(found.settings, path[1:]) == read(default, path[1:])
    else:
        refuse(kind, shorter)
    value = data
    for key in path:
        value = value[key]
    wrong: list[Any] = [None, [], [value], {"x": value}]
    if not isinstance(value, dict):  # Settings that say nothing are the defaults.
        wrong.append({})
    if isinstance(value, bool):
        wrong += [1, 0.0, "true"]
    elif isinstance(value, int):
        wrong += [True, 1.0, "1", -1, 1 << 64, 10**400, 0.5]
    elif isinstance(value, float):
        wrong += [True, "1", 10**400, float("nan"), float("inf")]
    elif isinstance(value, str):
        wrong += [True, 1, 0.5]
    for bad in wrong:
        refuse(kind, changed(data, path, functools.partial(put, bad)))


@pytest.mark.parametrize("name", GOLDEN)
def test_unknown_and_repeated_keys_are_refused(name: str) -> None:
    text, kind = GOLDEN[name], KINDS[name]
    assert "unknown" in refuse(kind, f'{text[:-1]},"extra":1}}'.encode())
    for key, value in json.loads(text).items():
        assert "repeats" in refuse(kind, f'{text[:-1]},"{key}":{json.dumps(value)}}}'.encode())


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"kind"',
    "no kind": b"{}",
    "kind is a list": b'{"kind":["hello"]}',
    "not UTF-8": b'{"kind":"hello\xff"}',
    "UTF-16": '{"kind":"hello"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + GOLDEN["hello"].encode(),
    "trailing": GOLDEN["hello"].encode() + b"{}",
    "deep list": b"[" * 30_000 + b"]" * 30_000,
    "deep object": b'{"kind":' * 7_000 + b"1" + b"}" * 7_000,
    "deep value": GOLDEN["hello"].replace('"session":4', f'"session":{"[" * 20_000}{"]" * 20_000}').encode(),
    "deep value, half as deep": GOLDEN["hello"].replace('"session":4', f'"session":{"[" * 900}{"]" * 900}').encode(),
    "deep value, a little deep": GOLDEN["hello"].replace('"session":4', f'"session":{"[" * 400}{"]" * 400}').encode(),
    "long number": GOLDEN["hello"].replace('"session":4', f'"session":{"9" * 60_000}').encode(),
    "large exponent": GOLDEN["hello"].replace("128.0", "1e999").encode(),
    "NaN": GOLDEN["hello"].replace("128.0", "NaN").encode(),
    "NaN as an integer": GOLDEN["hello"].replace('"session":4', '"session":-Infinity').encode(),
    "lone surrogate": GOLDEN["hello"].replace("aarch64", "\\ud800").encode(),
    "lone surrogate in a key": GOLDEN["hello"].replace("machine", "\\udfff").encode(),
    "too long": GOLDEN["hello"].replace("aarch64", "x" * MAX_DOCUMENT_BYTES).encode(),
    "long line": GOLDEN["hello"].replace("aarch64", "x" * (MAX_LINE + 1)).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused(name: str) -> None:
    refuse(Hello, HOSTILE[name])


@pytest.mark.parametrize("depth", range(100, 1_100, 100))
@pytest.mark.parametrize("shape", ["[", '{"x":'])
def test_nesting_of_any_depth_is_refused(depth: int, shape: str) -> None:
    """What the JSON parser still takes must not end the recursion of anything after it."""
    nested = shape * depth + "1" + {"[": "]", "{": "}"}[shape[0]] * depth
    for key, value in (("session", "4"), ("profile", '"rpi-zero-2w"'), ("ram_budget_mib", "128.0")):
        refuse(Hello, GOLDEN["hello"].replace(f'"{key}":{value}', f'"{key}":{nested}').encode())
    refuse(RunDocument, GOLDEN["run"].replace('"directions":"gaussian"', f'"directions":{nested}').encode())


@pytest.mark.parametrize("name", GOLDEN)
def test_random_damage_is_refused_or_still_valid(name: str) -> None:
    """Whatever parses is a valid document: it encodes and parses again to itself."""
    payload, source = GOLDEN[name].encode(), random.Random(name)
    for _ in range(600):
        data = bytearray(payload)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(data))
            action = source.randrange(3)
            if action == 0:
                data[place] = source.choice(b'0123456789"\\{}[],:.-eE \xff')
            elif action == 1:
                del data[place : place + source.randint(1, 5)]
            else:
                data[place:place] = data[source.randrange(len(data)) :][: source.randint(1, 20)]
        try:
            found = parse(KINDS[name], bytes(data))
        except ProtocolError as error:
            error.message.encode()
            continue
        assert parse(KINDS[name], found.encode()) == found


@settings(max_examples=200)
@given(payload=st.binary(max_size=200), kind=st.sampled_from(list(KINDS.values())))
def test_foreign_bytes_are_refused(payload: bytes, kind: type[Document]) -> None:
    refuse(kind, payload)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(data=st.data(), name=st.sampled_from(sorted(GOLDEN)))
def test_any_json_value_in_any_place_is_refused_or_valid(data: st.DataObject, name: str) -> None:
    original = json.loads(GOLDEN[name])
    path, value = data.draw(st.sampled_from(leaves(original))), data.draw(json_values)
    payload = changed(original, path, functools.partial(put, value))
    try:
        found = parse(KINDS[name], payload)
    except ProtocolError as error:
        error.message.encode()
        return
    assert parse(KINDS[name], found.encode()) == found


HASH, DIGEST = bytes(32).hex(), bytes(16).hex()


def run(run: str = "lenet-1", manifest_sha256: str = HASH, manifest_size: int = 1) -> RunDocument:
    return RunDocument(run, manifest_sha256, manifest_size, RunSettings())


LIMITS: dict[str, Callable[[], object]] = {
    "run: name": lambda: run(run="No Name"),
    "run: hash": lambda: run(manifest_sha256="00"),
    "run: upper case": lambda: run(manifest_sha256="A" * 64),
    "run: no hash": lambda: run(manifest_sha256=""),
    "run: empty manifest": lambda: run(manifest_size=0),
    "run: huge manifest": lambda: run(manifest_size=1 << 40),
    "head: name": lambda: Announcement("", 0, "enrol"),
    "head: round": lambda: Announcement("r", 2**32, "enrol"),
    "head: participants": lambda: Announcement("r", 1, "train", participants=bytes(30_000)),
    "head: mask hash": lambda: Announcement("r", 1, "train", mask_sha256="zz", mask_size=1),
    "head: empty mask": lambda: Announcement("r", 1, "train", mask_sha256=HASH),
    "head: huge mask": lambda: Announcement("r", 1, "train", mask_sha256=HASH, mask_size=1 << 40),
    "head: mask size without a mask": lambda: Announcement("r", 1, "train", mask_size=1),
    "head: log": lambda: Announcement("r", 1, "train", log_length=2**32),
    "head: log head": lambda: Announcement("r", 1, "train", log_head=HASH),
    "head: weights": lambda: Announcement("r", 1, "train", weights_digest="x" * 32),
    "hello: session": lambda: Hello(2**32, "", 0.0, 0, 0, "", ""),
    "hello: text": lambda: Hello(1, "", 0.0, 0, 0, "x" * (MAX_LINE + 1), ""),
    "state: session": lambda: Presence(2**32, "ready"),
    "state: run": lambda: Presence(1, "ready", "a/b"),
    "state: text": lambda: Presence(1, "ready", detail="x" * (MAX_LINE + 1)),
    "state: log": lambda: Presence(1, "ready", log_length=2**32),
    "state: weights": lambda: Presence(1, "ready", weights_digest=DIGEST + "00"),
    "order: name": lambda: Order("#", "welcome", 1),
    "order: session": lambda: Order("r", "welcome", 2**32),
    "order: ordinal": lambda: Order("r", "welcome", 1, 2**32),
    "order: text": lambda: Order("r", "refuse", 1, 0, "x" * (MAX_LINE + 1)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_hold_at_construction(name: str) -> None:
    with pytest.raises((ProtocolError, ConfigError)):
        LIMITS[name]()


def test_numbers_that_are_not_finite_are_not_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Hello(1, "", float("nan"), 0, 0, "", "").encode()


@given(ordinals=st.sets(st.integers(0, 100_000), max_size=300))
def test_participants_round_trip(ordinals: set[int]) -> None:
    packed = pack_participants(np.array(sorted(ordinals), dtype=np.int64))
    found = unpack_participants(packed)
    assert found.dtype == np.int64
    assert found.tolist() == sorted(ordinals)


def test_participants_of_a_large_run_fit() -> None:
    everybody = np.arange(100_000, dtype=np.int64)
    assert len(pack_participants(everybody)) < 200
    source = random.Random(1)
    half = np.array(sorted(source.sample(range(100_000), 50_000)), dtype=np.int64)
    head = Announcement("r", 1, "train", participants=pack_participants(half))
    assert np.array_equal(unpack_participants(parse(Announcement, head.encode()).participants), half)


@pytest.mark.parametrize(
    "packed",
    [
        b"!",
        bytes(3),
        b"\0",
        zlib.compress(b"\xff" * 8)[:-1],
        zlib.compress(b"\xff" * 8) + b"x",
        zlib.compress(bytes(1 << 17), 9),
        zlib.compress(bytes(100 << 20), 9)[: 24 << 10],
        b"\x78\x9c" + b"\xff" * 10,
        b" " + pack_participants(np.arange(3)),
    ],
    ids=["no zlib", "zeros", "zero", "cut", "tail", "bomb", "large bomb", "bad", "space"],
)
def test_participants_that_are_none_are_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_participants(packed)


def test_a_bomb_of_participants_inflates_no_further_than_the_limit() -> None:
    import tracemalloc

    bomb = zlib.compress(bytes(12 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="too large"):
            unpack_participants(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_presence_of_the_server_parses() -> None:
    assert parse(ServerPresence, b'{"kind": "server", "online": false, "birth": 3}') == ServerPresence(False, 3)
