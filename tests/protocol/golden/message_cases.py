"""One instance of every message and document, for the golden payloads in messages.json.

Run as a module it writes messages.json anew: ``python -m tests.protocol.golden.message_cases``. Only for a deliberate
change of the wire format, together with its version.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.codec import BinaryMessage
from fedzo.protocol.wire.documents import Announcement, Document, Hello, Order, Presence, RunDocument, ServerPresence
from fedzo.protocol.wire.framing import run_tag
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest, LogSlice, SnapshotOffer

PAYLOADS = Path(__file__).with_name("messages.json")

_HASH = bytes(range(32))
_DIGEST = bytes(range(16))
_TAG = run_tag("lenet-1")


def _scalars(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


_RECORD = UpdateRecord(
    3, 9, 0.0078125, ((4, 2), (70_000_000_000, 1), (2**60 + 7, 1)), _scalars(1.5, -0.25, 0.0, 8.0), _DIGEST, _HASH[16:]
)

MESSAGES: dict[str, BinaryMessage] = {
    "report of a probe": Report(
        ReportKind.PROBE, _TAG, 7, 2, 16, _DIGEST, 0.6931471805599453, 65, 1234, 91_000, (_scalars(0.5, -2.0, 1e-3),),
        micro_batch=8,
    ),
    "report of a saliency": Report(
        ReportKind.SALIENCY, _TAG, 1, 1, 64, bytes(16), 0.0, 300, 50_000, 80_000,
        (_scalars(1, 2), _scalars(0.5), _scalars(3)), micro_batch=32,
    ),
    "report that declines": Report(
        ReportKind.EVALUATE, _TAG, 8, 1, 0, _DIGEST, 0.0, 0, 3, 70_000, (), Decline.OVER_BUDGET, 4
    ),
    "update record": _RECORD,
    "update record with late scalars": UpdateRecord(
        3, 9, 0.0078125, ((4, 2), (0, 1), (2**60, 1)), _scalars(1.5, -0.25, 0.0, 8.0), _DIGEST, _HASH[16:], (0, 2, 1)
    ),
    "receipt": Receipt(_TAG, 7, Verdict.ACCEPTED),
    "announcement": Announcement(
        run="lenet-1", round=12, phase="train", participants=bytes.fromhex("789c6364000000030002"),
        mask_sha256=_HASH.hex(), mask_size=900, log_length=11, log_head=_DIGEST.hex(), weights_digest=_HASH[16:].hex(),
        k=24, sigma=0.00048828125,
    ),
    "announcement with levels": Announcement(
        run="lenet-1", round=12, phase="train", participants=bytes.fromhex("789c6364000000030002"), k=24,
        pace=bytes.fromhex("789c6360000000020001"),
    ),
    "announcement of the enrolment": Announcement("lenet-1", 0, "enrol"),
    "blob request": BlobRequest(_HASH, 65_536, 4_096),
    "blob block": BlobBlock(_HASH, 65_536, 65_540, b"data"),
    "blob block of an absent blob": BlobBlock(_HASH, 0, 0, b""),
    "log request": LogRequest(12, 1_024),
    "log request for records only": LogRequest(12, 1_024, records_only=True),
    "snapshot offer": SnapshotOffer(40, 47, 1_200, bytes(range(32))),
    "log slice": LogSlice(
        3, (_RECORD, UpdateRecord(4, 10, 0.5, ((0, 1),), _scalars(-3.0), _HASH[16:], _DIGEST))
    ),
}  # fmt: skip

DOCUMENTS: dict[str, Document] = {
    "server": ServerPresence(online=True, birth=1_700_000_000_000),
    "run": RunDocument(
        run="lenet-1",
        manifest_sha256=_HASH.hex(),
        manifest_size=4_242,
        settings=RunSettings(
            seed=2**64 - 1,
            sparsity=0.75,
            saliency=SaliencySettings(steps=3, samples=32, shift=0.0625, draws=8, inputs="data"),
            training=TrainingSettings(
                rounds=200, estimator="node", directions="gaussian", assignment="shared", k=8, tail_k=96, repeats=12,
                feedback=0.875, sigma=0.0009765625, two_sided=True,
                batch=4, optimiser=OptimiserConfig("momentum", 0.5, 0.75, 0.125, 0.25, 0.5, 0.875),
                learning_rate=0.5, schedule="step", warmup=5, decay_every=50, decay_factor=0.25, final_rate=0.125,
                k_max=96, adapt_sigma=True, local_steps=1, local_rate=0.0625,
            ),
            devices=5, quorum=3, deadline_s=12.5, enrol_deadline_s=60.0, patience=2, evaluate_every=10,
            scalar_limit=1e4, tune_rounds=40,
        ),
    ),
    "hello": Hello(4, "rpi-zero-2w", 128.0, 600, 60, "onnxruntime 1.32.0,numpy 2.3.1", "aarch64"),
    "state": Presence(4, "refused", "lenet-1", "needs 300 MiB – too much", 11, _DIGEST.hex(), 96.5, 8, 12),
    "order": Order("lenet-1", "welcome", 4, 17, "", 4),
}  # fmt: skip


def compute() -> dict[str, dict[str, str]]:
    """Payloads of all cases: hex of the binary ones, text of the JSON ones."""
    return {
        "messages": {name: message.encode().hex() for name, message in MESSAGES.items()},
        "documents": {name: document.encode().decode() for name, document in DOCUMENTS.items()},
    }


if __name__ == "__main__":
    PAYLOADS.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
