"""The Ed25519 verifier: RFC 8032's vectors, agreement with a library, and every signature that must not count."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.protocol.wire import ed25519
from fedzo.protocol.wire.ed25519 import is_public_key, verify

ORDER = 2**252 + 27742317777372353535851937790883648493
PRIME = 2**255 - 19

# RFC 8032, section 7.1: secret key, public key, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        (
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
            "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704"
        ),
    ),
]
# Points of small order in all their encodings, canonical or not ("Taming the many EdDSAs", section 4).
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]
keys = st.binary(min_size=32, max_size=32).map(Ed25519PrivateKey.from_private_bytes)


def library_accepts(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_the_rfcs_vectors(secret: str, public: str, message: str, signature: str) -> None:
    key, text, proof = bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature)
    assert Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)).sign(text) == proof
    assert verify(key, text, proof)
    assert not verify(key, text + b"\0", proof)


@given(keys, st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_what_the_library_signs_is_accepted(key: Ed25519PrivateKey, message: bytes) -> None:
    assert verify(key.public_key().public_bytes_raw(), message, key.sign(message))


@given(keys, st.binary(max_size=64), st.data())
@settings(max_examples=120, deadline=None)
def test_a_changed_bit_is_refused_by_both(key: Ed25519PrivateKey, message: bytes, data: st.DataObject) -> None:
    public, signature = key.public_key().public_bytes_raw(), key.sign(message)
    parts = [bytearray(public), bytearray(message), bytearray(signature)]
    part = data.draw(st.sampled_from([part for part in parts if part]))
    bit = data.draw(st.integers(0, 8 * len(part) - 1))
    part[bit // 8] ^= 1 << bit % 8
    changed = [bytes(part) for part in parts]
    assert not verify(changed[0], changed[1], changed[2])
    assert not library_accepts(changed[0], changed[1], changed[2])


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=8), st.binary(min_size=64, max_size=64))
@settings(max_examples=60, deadline=None)
def test_foreign_bytes_are_refused_and_nothing_is_raised(public: bytes, message: bytes, signature: bytes) -> None:
    assert verify(public, message, signature) is False


@given(st.binary(max_size=100), st.binary(max_size=100))
@settings(deadline=None)
def test_other_lengths_are_refused(public: bytes, signature: bytes) -> None:
    if len(public) != 32 or len(signature) != 64:
        assert verify(public, b"", signature) is False
        assert len(public) == 32 or not is_public_key(public)


@given(keys, st.binary(max_size=32), st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_a_second_form_of_a_signature_is_refused(key: Ed25519PrivateKey, message: bytes, times: int) -> None:
    """S + L satisfies the equation as well (RFC 8032, section 8.4)."""
    signature = key.sign(message)
    scalar = int.from_bytes(signature[32:], "little") + times * ORDER
    if scalar < 1 << 256:
        assert not verify(key.public_key().public_bytes_raw(), message, signature[:32] + scalar.to_bytes(32, "little"))


@pytest.mark.parametrize("encoding", SMALL_ORDER)
def test_keys_of_small_order_are_refused(encoding: str) -> None:
    """Under the neutral element ``R = S B`` holds for every message."""
    public = bytes.fromhex(encoding)
    assert not is_public_key(public)
    for scalar in (0, 1, 5):
        point = ed25519._encode(ed25519._combine(scalar, ed25519._BASE, 0, ed25519._BASE))
        assert not verify(public, b"anything", point + scalar.to_bytes(32, "little"))


def test_the_neutral_key_would_sign_everything() -> None:
    """The test above can fail: OpenSSL takes such a key and signature."""
    point = ed25519._encode(ed25519._BASE)
    assert library_accepts(bytes.fromhex(SMALL_ORDER[0]), b"anything", point + (1).to_bytes(32, "little"))


def test_a_key_with_a_part_of_small_order_follows_the_equation_without_cofactor() -> None:
    """A + T, T of order 8: a signature by a counts where k T vanishes, as in OpenSSL, and only there."""
    torsion = ed25519._decode(bytes.fromhex(SMALL_ORDER[4]))
    assert torsion is not None
    secret, nonce = 7, 11
    mixed = ed25519._encode(ed25519._add(ed25519._combine(secret, ed25519._BASE, 0, ed25519._BASE), torsion))
    assert is_public_key(mixed)
    answers = []
    for number in range(32):
        message = number.to_bytes(1, "little")
        point = ed25519._encode(ed25519._combine(nonce, ed25519._BASE, 0, ed25519._BASE))
        challenge = int.from_bytes(hashlib.sha512(point + mixed + message).digest(), "little") % ORDER
        signature = point + ((nonce + challenge * secret) % ORDER).to_bytes(32, "little")
        answers.append(verify(mixed, message, signature))
        assert answers[-1] == library_accepts(mixed, message, signature)
    assert 0 < sum(answers) < len(answers)


@pytest.mark.parametrize("y", [0, 1, 2, 3, 4, 5, 9, 18])
@pytest.mark.parametrize("sign", [0, 1])
def test_keys_that_are_not_reduced_are_refused(y: int, sign: int) -> None:
    """The nineteen coordinates from p up have a second encoding."""
    assert not is_public_key((PRIME + y | sign << 255).to_bytes(32, "little"))


def test_an_r_that_is_not_reduced_is_refused() -> None:
    """R = (0, 1) written as p + 1: the equation holds for the point, not for the bytes."""
    public = bytes.fromhex(VECTORS[0][1])
    for encoding in (SMALL_ORDER[0], SMALL_ORDER[10], SMALL_ORDER[8]):
        point = bytes.fromhex(encoding)
        secret = hashlib.sha512(bytes.fromhex(VECTORS[0][0])).digest()[:32]
        scalar = (int.from_bytes(secret, "little") & ((1 << 254) - 8)) | 1 << 254
        challenge = int.from_bytes(hashlib.sha512(point + public + b"m").digest(), "little") % ORDER
        signature = point + (challenge * scalar % ORDER).to_bytes(32, "little")
        assert verify(public, b"m", signature) == (encoding == SMALL_ORDER[0])
