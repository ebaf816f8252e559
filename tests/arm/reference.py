"""What this machine computes, for the battery to compare with: ``python -m tests.arm.reference FOLDER``.

Needs the exporter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.pruning.mask import Mask
from tests.arm.battery import LENET, REFERENCE, RESNET, close, exact, small_mask


def write_reference(folder: Path) -> None:
    """Export the models of the battery and compute its forward passes and digests."""
    export_artifact("lenet5", (1, 16, 16), 4, 0.9, 1, folder / LENET)
    export_artifact("resnet20", (3, 32, 32), 10, 0.9, 1, folder / RESNET)
    mask = small_mask(folder)
    numbers = {
        "exact": exact(folder),
        "close": close(folder),
        "encoded mask": mask.encode().hex(),
        "other encoded mask": Mask.dense(mask.layout).encode().hex(),  # with which a test spoils the file
    }
    (folder / REFERENCE).write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
