"""Payloads that an attacker would send: good ones of this very moment, damaged in the ways that parsers fall for."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

__all__ = ["MUTATIONS", "mutate"]

_INTEGERS = (0, 1, 2, 7, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38, -3.4e38, 0.0, -0.0)
_NUMBERS = (0, -1, 1, 2**31, 2**32, 2**63, 2**64, -(2**64), 10**400, 0.5, -1e308, 1e-308, 1e400, True)
_BOMB = zlib.compress(bytes(4 << 20), 9)
_BOMBS = (_BOMB, base64.b64encode(_BOMB), zlib.compress(_BOMB, 9))
_DEEP = b"[" * 50_000
_NAN_JSON = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" * 5_000)


def _flip(data: bytearray, source: random.Random, _other: bytes) -> bytes:
    for _ in range(source.randint(1, 8)):
        if data:
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(data)


def _write(packed: bytes, data: bytearray, source: random.Random) -> bytes:
    start = source.randrange(len(data) + 1)
    data[start : start + len(packed)] = packed
    return bytes(data)


def _integer(data: bytearray, source: random.Random, _: bytes) -> bytes:
    value, code = source.choice(_INTEGERS), source.choice("BHIQ")
    return _write(struct.pack(f"<{code}", value % (1 << 8 * struct.calcsize(code))), data, source)


def _float(data: bytearray, source: random.Random, _: bytes) -> bytes:
    value = source.choice(_FLOATS)
    packed = struct.pack("<d", value) if source.random() < 0.5 else _as_float32(value)
    return _write(packed * source.choice((1, 1, 4)), data, source)


def _as_float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf"))


def _truncate(data: bytearray, source: random.Random, _: bytes) -> bytes:
    return bytes(data[: source.randrange(len(data) + 1)])


def _extend(data: bytearray, source: random.Random, _: bytes) -> bytes:
    return bytes(data) + source.randbytes(source.choice((1, 2, 3, 4, 64, 4_096)))


def _repeat(data: bytearray, source: random.Random, _: bytes) -> bytes:
    if not data:
        return b""
    start = source.randrange(len(data))
    part = data[start : start + source.randint(1, 64)]
    return bytes(data[:start] + part * source.randint(2, 8) + data[start:])


def _remove(data: bytearray, source: random.Random, _: bytes) -> bytes:
    start = source.randrange(len(data) + 1)
    return bytes(data[:start] + data[start + source.randint(1, 32) :])


def _splice(data: bytearray, source: random.Random, other: bytes) -> bytes:
    return bytes(data[: source.randrange(len(data) + 1)]) + other[source.randrange(len(other) + 1) :]


def _noise(_data: bytearray, source: random.Random, _: bytes) -> bytes:
    return source.randbytes(source.choice((0, 1, 2, 3, 16, 64, 200, 1_000)))


def _headed_noise(data: bytearray, source: random.Random, _: bytes) -> bytes:
    """A good version and type, then anything."""
    return bytes(data[:2]) + source.randbytes(source.choice((0, 10, 40, 54, 62, 200)))


def _huge(data: bytearray, source: random.Random, _: bytes) -> bytes:
    return bytes(data) + bytes(source.choice((64 << 10, 128 << 10, 300 << 10)))


def _bomb(data: bytearray, source: random.Random, _: bytes) -> bytes:
    start = source.randrange(len(data) + 1)
    return bytes(data[:start]) + source.choice(_BOMBS) + bytes(data[start:])


def _document(data: bytearray, source: random.Random, _: bytes) -> bytes:
    """Any value of a JSON document becomes another one, a key goes, comes, or comes twice."""
    try:
        raw = json.loads(bytes(data))
    except (ValueError, RecursionError):
        return _flip(data, source, b"")
    place: Any = raw
    while isinstance(place, dict) and place:
        key = source.choice(sorted(place))
        if isinstance(place[key], dict) and source.random() < 0.8:
            place = place[key]
            continue
        what = source.random()
        if what < 0.1:
            del place[key]
        elif what < 0.2:
            place[source.choice(("", "x", "__class__", "kind", key + "2"))] = place[key]
        else:
            place[key] = _value(source, place[key])
        break
    try:
        text = json.dumps(raw).encode()
    except (ValueError, UnicodeEncodeError):
        return b"{}"
    return text.replace(b"{", b'{"kind":"run",', 1) if source.random() < 0.02 else text


def _value(source: random.Random, old: object) -> object:
    if isinstance(old, (int, float)) and source.random() < 0.5:
        return source.choice((old + 1, old - 1, -old, old * 2, source.getrandbits(32), source.random()))
    return source.choice((
        source.choice(_NUMBERS), None, [], {}, "", "x" * source.choice((1, 49, 2_000, 40_000)), "\ud800", "\0", "../..",
        [[]] * 3, {"a": {"b": 1}}, "0" * 64, "00" * 16, base64.b64encode(source.choice(_BOMBS[:2])).decode(),
        base64.b64encode(zlib.compress(source.randbytes(40), 9)).decode(), "train", "done", "lost", "refuse", old,
    ))  # fmt: skip


def _not_json(_data: bytearray, source: random.Random, _: bytes) -> bytes:
    number = source.choice(_NAN_JSON)
    return source.choice(
        (_DEEP, b'{"kind":' + _DEEP, b'{"a":' + number + b"}", number, b"\xff\xfe{}", b"\xef\xbb\xbf{}")
    )


def _same(data: bytearray, _: random.Random, __: bytes) -> bytes:
    """A replay."""
    return bytes(data)


MUTATIONS: tuple[tuple[float, Callable[[bytearray, random.Random, bytes], bytes]], ...] = (
    (14, _flip), (10, _integer), (10, _float), (8, _truncate), (6, _extend), (5, _repeat), (5, _remove), (8, _splice),
    (4, _noise), (4, _headed_noise), (0.5, _huge), (1, _bomb), (16, _document), (0.5, _not_json), (6, _same),
)  # fmt: skip
_WEIGHTS = tuple(weight for weight, _ in MUTATIONS)
_FUNCTIONS = tuple(function for _, function in MUTATIONS)


def mutate(payload: bytes, source: random.Random, other: bytes) -> bytes:
    """A hostile version of a good payload.

    Args:
        payload: A good one.
        source: Decides.
        other: Another good one, to be mixed in.
    """
    for function in source.choices(_FUNCTIONS, _WEIGHTS, k=source.choice((1, 1, 1, 2))):
        payload = function(bytearray(payload), source, other)
    return payload
