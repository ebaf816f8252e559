"""The documents: small, schema-checked JSON. What is hot travels as the binary messages of ``messages.py``.

One document is hot too, the announcement, so that its bytes are fixed (``announcement_bytes.py``).

A document is one flat frozen dataclass. :func:`parse` checks each field against its annotation, refuses unknown,
repeated and missing keys, numbers that are not finite and texts that are too long, and raises nothing but
``ProtocolError``. A document's own limits hold from its construction on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import struct
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import numpy as np

from ..artifact.manifest import MAX_MANIFEST_BYTES
from ..errors import ConfigError, ProtocolError
from ..settings import MAX_SIGMA, MIN_SIGMA, RunSettings, SaliencySettings, TrainingSettings
from .announcement_bytes import pack_announcement, unpack_announcement
from .framing import DIGEST_BYTES, check_unsigned, run_tag
from .participants import MAX_PARTICIPANTS_BYTES, pack_participants, unpack_participants
from .topics import check_name

__all__ = [
    "Announcement",
    "Document",
    "Hello",
    "Order",
    "Phase",
    "Presence",
    "RunDocument",
    "ServerPresence",
    "Status",
    "one_line",
    "pack_participants",
    "parse",
    "unpack_participants",
]

MAX_DOCUMENT_BYTES = 64 << 10
MAX_LINE = 1_000
MAX_MASK_BYTES = 64 << 20
Phase = Literal["enrol", "saliency", "train", "evaluate", "done"]
Status = Literal["joining", "ready", "done", "refused", "left", "lost"]


@dataclass(frozen=True, slots=True)
class Document:
    """Base of the documents; :attr:`KIND` is the ``kind`` key of the JSON object."""

    KIND: ClassVar[str] = ""

    def encode(self) -> bytes:
        """The payload: compact JSON, keys sorted."""
        data = {**_plain(self), "kind": self.KIND}
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_hex(name: str, text: str, length: int, *, optional: bool = True) -> None:
    if not (optional and not text) and not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", text):
        raise ProtocolError(f"{name} {text[:80]!r} is not {2 * length} hex digits")


def _check_lines(*texts: str) -> None:
    for text in texts:
        if len(text) > MAX_LINE:
            raise ProtocolError(f"a text of {len(text)} characters is over the limit of {MAX_LINE}")


@dataclass(frozen=True, slots=True)
class ServerPresence(Document):
    """Retained on ``srv``, with ``online`` false as the server's will.

    Attributes:
        online: Whether the server is there.
        birth: Grows with every start of a server, so that an old will is known as old.
    """

    KIND: ClassVar[str] = "server"
    online: bool
    birth: int


@dataclass(frozen=True, slots=True)
class RunDocument(Document):
    """Retained on ``run``: what every device needs to compute the same thing.

    Attributes:
        run: Run id, ``[a-z0-9-]{1,48}``.
        manifest_sha256: Hash of the artifact's ``manifest.json``, 64 hex digits.
        manifest_size: Its length in bytes.
        settings: The run's settings.
    """

    KIND: ClassVar[str] = "run"
    run: str
    manifest_sha256: str
    manifest_size: int
    settings: RunSettings

    def __post_init__(self) -> None:
        check_name("run", self.run)
        _check_hex("the manifest's hash", self.manifest_sha256, 32, optional=False)
        if not 1 <= self.manifest_size <= MAX_MANIFEST_BYTES:
            raise ProtocolError(f"a manifest has 1 to {MAX_MANIFEST_BYTES} bytes, not {self.manifest_size}")

    @property
    def tag(self) -> bytes:
        """What names the run in binary messages."""
        return run_tag(self.run)

    @property
    def saliency(self) -> SaliencySettings:
        """How scores are made."""
        return self.settings.saliency

    @property
    def training(self) -> TrainingSettings:
        """How training is done."""
        return self.settings.training


@dataclass(frozen=True, slots=True)
class Announcement(Document):
    """Retained on ``head``: the open round. Binary, unlike the other documents.

    Attributes:
        run: Run id.
        round: Round number, unique in the run over all phases.
        phase: What to do.
        participants: Packed set of ordinals (:func:`pack_participants`).
        mask_sha256: Hash of the encoded mask, 64 hex digits; empty while there is none.
        mask_size: Its length in bytes.
        log_length: Update records before this round; with the settings and the participants it decides which positions
            a device gets (``perturbation/blocks.py``).
        log_head: Chain digest of the log, 32 hex digits; empty before training.
        weights_digest: Digest of the weights, 32 hex digits; empty before training.
        k: Directions per device of the first block, of others in proportion; 0 for the settings' number.
        sigma: Length scale of perturbations, a float32 value; 0 for the settings'.
        pace: How often the directions of every participant are halved (``server_side/pace.py``); empty for never.
    """

    KIND: ClassVar[str] = "head"
    run: str
    round: int
    phase: Phase
    participants: bytes = b""
    mask_sha256: str = ""
    mask_size: int = 0
    log_length: int = 0
    log_head: str = ""
    weights_digest: str = ""
    k: int = 0
    sigma: float = 0.0
    pace: bytes = b""

    def __post_init__(self) -> None:
        check_name("run", self.run)
        check_unsigned("round", self.round, 32)
        check_unsigned("log length", self.log_length, 32)
        check_unsigned("k", self.k, 16)
        if self.sigma and not (MIN_SIGMA < self.sigma < MAX_SIGMA and float(np.float32(self.sigma)) == self.sigma):
            raise ProtocolError(f"sigma {self.sigma!r} is no float32 value above {MIN_SIGMA} and below {MAX_SIGMA}")
        if len(self.pace) > MAX_PARTICIPANTS_BYTES:
            raise ProtocolError(f"levels of {len(self.pace)} bytes are over the limit of {MAX_PARTICIPANTS_BYTES}")
        if (size := len(self.participants)) > MAX_PARTICIPANTS_BYTES:
            raise ProtocolError(f"a set of participants of {size} bytes is over the limit of {MAX_PARTICIPANTS_BYTES}")
        _check_hex("the mask's hash", self.mask_sha256, 32)
        least, most = (1, MAX_MASK_BYTES) if self.mask_sha256 else (0, 0)
        if not least <= self.mask_size <= most:
            raise ProtocolError(f"the mask {self.mask_sha256!r} has {least} to {most} bytes, not {self.mask_size}")
        _check_hex("the log's head", self.log_head, DIGEST_BYTES)
        _check_hex("the weights' digest", self.weights_digest, DIGEST_BYTES)

    def encode(self) -> bytes:
        """The payload."""
        return pack_announcement(_plain(self))

    @classmethod
    def decode(cls, data: bytes) -> Announcement:
        """Inverse of :meth:`encode`; called by :func:`parse` and ``codec.decode``.

        Raises:
            ProtocolError: The bytes are no announcement.
        """
        try:
            return cls(**unpack_announcement(data))
        except (ValueError, struct.error, ConfigError) as error:
            raise ProtocolError(f"malformed announcement: {error}") from None


@dataclass(frozen=True, slots=True)
class Hello(Document):
    """A device introduces itself.

    Attributes:
        session: Boot counter; grows with every start of the device.
        profile: Name of its hardware profile.
        ram_budget_mib: What the profile allows.
        samples: Training samples it holds.
        holdout: Samples it keeps for evaluation.
        versions: Texts such as ``onnxruntime 1.32.0``, joined by commas.
        machine: Instruction set, for example ``aarch64``.
    """

    KIND: ClassVar[str] = "hello"
    session: int
    profile: str
    ram_budget_mib: float
    samples: int
    holdout: int
    versions: str
    machine: str

    def __post_init__(self) -> None:
        check_unsigned("session", self.session, 32)
        _check_lines(self.profile, self.versions, self.machine)


@dataclass(frozen=True, slots=True)
class Presence(Document):
    """Retained on ``d/DEV/state``, with ``lost`` as the device's will.

    Attributes:
        session: Boot counter; a will of an older session is ignored.
        status: How the device is.
        run: The run that it speaks of; empty when it knows none.
        detail: One line for people, for example why it refused.
        log_length: Update records applied.
        weights_digest: Digest of its weights, 32 hex digits; empty before training.
        planned_peak_mib: What its memory plan says; 0 before there is one.
        micro_batch: Samples of one run of a graph in that plan; 0 before there is one.
        round: The first round of that run that it may still answer: the last one that was announced to it, or one
            more if it has a receipt for that; 0 for none.
    """

    KIND: ClassVar[str] = "state"
    session: int
    status: Status
    run: str = ""
    detail: str = ""
    log_length: int = 0
    weights_digest: str = ""
    planned_peak_mib: float = 0.0
    micro_batch: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        check_unsigned("micro-batch", self.micro_batch, 16)
        check_unsigned("session", self.session, 32)
        check_unsigned("round", self.round, 32)
        check_unsigned("log length", self.log_length, 32)
        if self.run:
            check_name("run", self.run)
        _check_lines(self.detail)
        _check_hex("the weights' digest", self.weights_digest, DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Order(Document):
    """The server tells one device what it is.

    Attributes:
        run: Run id.
        action: ``enrol``: known, wait for a number; ``welcome``: the ordinal holds from now on; ``introduce``: not
            known any more, say hello; ``excuse``: it needs more memory than it may use, the run goes on without it;
            ``refuse`` for good.
        session: The session that it answers.
        ordinal: The device's number in the run, from 0; its place in every round follows from it.
        detail: One line for people.
        micro_batch: The largest that the device may plan with from now on; 0 for no limit. The smallest one that a
            session was ever told holds.
    """

    KIND: ClassVar[str] = "order"
    run: str
    action: Literal["enrol", "welcome", "introduce", "excuse", "refuse"]
    session: int
    ordinal: int = 0
    detail: str = ""
    micro_batch: int = 0

    def __post_init__(self) -> None:
        check_unsigned("micro-batch", self.micro_batch, 16)
        check_name("run", self.run)
        check_unsigned("session", self.session, 32)
        check_unsigned("ordinal", self.ordinal, 32)
        _check_lines(self.detail)


_Kind = TypeVar("_Kind", bound=Document)


def parse(kind: type[_Kind], data: bytes) -> _Kind:
    """Parse one payload.

    Args:
        kind: The document class that the topic carries.
        data: The payload.

    Raises:
        ProtocolError: The bytes are no document of that kind. Nothing else is raised, whatever the bytes.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ProtocolError(f"a document of {len(data)} bytes is over the limit of {MAX_DOCUMENT_BYTES}")
    if issubclass(kind, Announcement):
        return typing.cast(_Kind, kind.decode(data))
    try:
        raw = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a {kind.KIND} document is not JSON, or repeats a key") from None
    if not isinstance(raw, dict) or raw.pop("kind", None) != kind.KIND:
        raise ProtocolError(f"a payload is not a {kind.KIND} document")
    try:
        return typing.cast(_Kind, _build(kind, raw))
    except RecursionError:
        raise ProtocolError(f"a {kind.KIND} document is nested too deeply") from None
    except (TypeError, ValueError, OverflowError, ConfigError) as error:
        raise ProtocolError(f"malformed {kind.KIND} document: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated key")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Annotations of a document's fields; resolving them takes longer than parsing the document."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as objects of JSON; what is in it is not copied, which takes most of the time of ``asdict``."""
    kind: type = type(value)
    found = {name: getattr(value, name) for name in _hints(kind)}
    return {name: _plain(item) if dataclasses.is_dataclass(item) else item for name, item in found.items()}


@functools.cache
def _optional(kind: type) -> frozenset[str]:
    """Keys that may be missing: a setting that came later has a default that changes nothing."""
    fields, unset = dataclasses.fields(kind), dataclasses.MISSING
    if issubclass(kind, Document):
        return frozenset()
    return frozenset(f.name for f in fields if f.default is not unset or f.default_factory is not unset)


def _build(kind: type, raw: object) -> object:
    if not isinstance(raw, dict):
        raise TypeError(f"{kind.__name__} is not an object")
    hints = _hints(kind)
    if wrong := (raw.keys() ^ hints.keys()) - (_optional(kind) - raw.keys()):
        raise ValueError(f"the key {min(wrong)[:40]!r} is {'unknown' if min(wrong) in raw else 'missing'}")
    return kind(**{name: _value(hints[name], value) for name, value in raw.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value)
    if typing.get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in typing.get_args(hint):
            raise ValueError(f"{str(value)[:40]!r} is not one of {', '.join(typing.get_args(hint))}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return value
    raise TypeError(f"{str(value)[:40]!r} is not a valid {getattr(hint, '__name__', hint)}")


def one_line(text: str) -> str:
    """A text for people as it can travel: short, and without the lone surrogates of undecodable file names."""
    return text[: MAX_LINE // 2].encode("utf-8", "replace").decode()
