"""Ed25519 signatures: a strict verifier (RFC 8032, section 5.1.7), in Python and nothing else.

The server signs with a library (``broker_server/security/signing.py``). Boards only verify, and do so with this module,
also where a library is at hand: importing one costs 7.7 MiB of a budget that was planned to the MiB (``cryptography``
50 on x86-64), and two verifiers may disagree about signatures that no honest signer makes, so that one board of a fleet
accepts what another refuses. Python's integers do not run in constant time; that is no loss, since a verifier handles
public data only. There is no signing here, and none must be added: that would leak the key.

Strict means: ``S`` below the group's order (else a signature has a second form), both points in their one canonical
encoding, no key of small order (under such a key one signature fits many messages), and the equation without the
cofactor, ``R = S B - k A``, compared as bytes. The cases are those of "Taming the many EdDSAs" (Chalkias, Garillot and
Nikolaenko 2020, table 5), which ``tests/protocol/wire/test_ed25519.py`` goes through.
"""

from __future__ import annotations

import hashlib

__all__ = ["KEY_BYTES", "SIGNATURE_BYTES", "is_public_key", "verify"]

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_PRIME = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _PRIME) % _PRIME
_SQRT_OF_MINUS_ONE = pow(2, (_PRIME - 1) // 4, _PRIME)
_SIGN_BIT = 1 << 255

_Point = tuple[int, int, int, int]  # extended coordinates: x = X/Z, y = Y/Z, T = XY/Z
_NEUTRAL: _Point = (0, 1, 1, 0)


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether this key signed this message.

    Args:
        public_key: 32 bytes.
        message: What was signed.
        signature: 64 bytes; any others are no signature.
    """
    key = _decode_key(public_key)
    if key is None or len(signature) != SIGNATURE_BYTES:
        return False
    scalar = int.from_bytes(signature[32:], "little")
    if scalar >= _ORDER:
        return False
    digest = hashlib.sha512(signature[:32] + public_key + message).digest()
    challenge = int.from_bytes(digest, "little") % _ORDER
    # An encoding that is not canonical differs from what `_encode` gives.
    return _encode(_combine(scalar, _BASE, challenge, _negate(key))) == signature[:32]


def is_public_key(data: bytes) -> bool:
    """Whether some private key can have this public key: canonical, on the curve and not of small order."""
    return _decode_key(data) is not None


def _decode_key(data: bytes) -> _Point | None:
    point = _decode(data)
    if point is None:
        return None
    x, y, z, _ = _double(_double(_double(point)))
    return None if x == 0 and y == z else point


def _decode(data: bytes) -> _Point | None:
    """RFC 8032, section 5.1.3."""
    if len(data) != KEY_BYTES:
        return None
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & (_SIGN_BIT - 1)
    if y >= _PRIME:
        return None
    numerator, denominator = (y * y - 1) % _PRIME, (_D * y * y + 1) % _PRIME
    x = numerator * pow(denominator, 3, _PRIME) % _PRIME
    x = x * pow(numerator * pow(denominator, 7, _PRIME), (_PRIME - 5) // 8, _PRIME) % _PRIME
    square = denominator * x * x % _PRIME
    if square != numerator:
        if square != -numerator % _PRIME:
            return None
        x = x * _SQRT_OF_MINUS_ONE % _PRIME
    if x == 0 and sign:
        return None
    if x & 1 != sign:
        x = _PRIME - x
    return x, y, 1, x * y % _PRIME


def _encode(point: _Point) -> bytes:
    x, y, z, _ = point
    inverse = pow(z, -1, _PRIME)
    return (y * inverse % _PRIME | (x * inverse % _PRIME & 1) << 255).to_bytes(32, "little")


def _add(a: _Point, b: _Point) -> _Point:
    """RFC 8032, section 5.1.4; complete, so it also doubles."""
    e, h = (a[1] - a[0]) * (b[1] - b[0]), (a[1] + a[0]) * (b[1] + b[0])
    f, g = 2 * a[3] * b[3] * _D, 2 * a[2] * b[2]
    e, f, g, h = (h - e) % _PRIME, (g - f) % _PRIME, (g + f) % _PRIME, (h + e) % _PRIME
    return e * f % _PRIME, g * h % _PRIME, f * g % _PRIME, e * h % _PRIME


def _double(a: _Point) -> _Point:
    x, y, z, _ = a
    squares = x * x + y * y
    e, g = (squares - (x + y) ** 2) % _PRIME, (x * x - y * y) % _PRIME
    f, h = (2 * z * z + g) % _PRIME, squares % _PRIME
    return e * f % _PRIME, g * h % _PRIME, f * g % _PRIME, e * h % _PRIME


def _negate(a: _Point) -> _Point:
    return -a[0] % _PRIME, a[1], a[2], -a[3] % _PRIME


def _combine(m: int, a: _Point, n: int, b: _Point) -> _Point:
    """``m a + n b``, both scalars bit by bit together (Straus)."""
    table = (_NEUTRAL, a, b, _add(a, b))
    total = _NEUTRAL
    for bit in range(max(m.bit_length(), n.bit_length()) - 1, -1, -1):
        total = _double(total)
        chosen = (m >> bit & 1) | (n >> bit & 1) << 1
        if chosen:
            total = _add(total, table[chosen])
    return total


def _base() -> _Point:
    y = 4 * pow(5, -1, _PRIME) % _PRIME
    point = _decode(y.to_bytes(32, "little"))
    assert point is not None
    return point


_BASE = _base()
