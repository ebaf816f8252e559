"""Writes vectors.json anew: ``python -m tests.protocol.golden.make``.

Only for a deliberate change of the contract: every device of a run must then be updated together with its server.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.protocol.golden.cases import compute

VECTORS = Path(__file__).with_name("vectors.json")

if __name__ == "__main__":
    VECTORS.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
