"""A whole run with emulated boards: a native server, a native device and one emulated device a processor.

Runs natively, as ``python -m tests.arm.federation FOLDER ARCHITECTURE CPU...``; FOLDER is what ``tests.arm.reference``
wrote. Prints one JSON object and ends with exit code 7 when the weights of one of them differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedzo.broker_server.brokers.mosquitto import find_mosquitto
from tests.arm.battery import LENET, MISMATCH
from tests.board_fixture import ROOT
from tests.end_to_end.fleet import Fleet, agree, write_images

EMULATE = ROOT / "scripts" / "emulate-arm"
START_S = 120  # an emulated Python takes seconds to import what it needs, several of them on two cores more
RUN_S = 400


def run(folder: Path, reference: Path, architecture: str, cpus: Sequence[str]) -> dict[str, Any]:
    """Run a federation.

    Args:
        folder: Of its own, for data, logs and states.
        reference: What ``tests.arm.reference`` wrote.
        architecture: Of the emulated boards.
        cpus: Their processors.

    Returns:
        The server's answer, the devices' answers, the native one first, and the weights digest of all.

    Raises:
        AssertionError: A program failed, or the weights differ.
    """
    *data, test = [write_images(folder / f"images-{seed}.npz", seed) for seed in range(len(cpus) + 2)]
    broker = "mosquitto" if find_mosquitto() else "amqtt"
    fleet = Fleet(folder, reference / LENET, data, test, broker=broker)
    try:
        server = fleet.serve("--deadline", START_S, "--enrol-deadline", START_S)
        devices = [fleet.device(0)]
        for number, cpu in enumerate(cpus, start=1):
            program = (EMULATE, architecture, "--cpu", cpu, "-m", "fedzo.edge_runtime")
            devices.append(fleet.device(number, program=program))
        answer = server.answer(RUN_S)
        answers = [device.answer() for device in devices]
    finally:
        fleet.close()
    return {"server": answer, "devices": answers, "digest": agree(answer, answers)}


def main() -> int:
    """Print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of tests.arm.reference")
    parser.add_argument("architecture", choices=["aarch64", "armhf"])
    parser.add_argument("cpus", nargs="+", metavar="cpu")
    arguments = parser.parse_args()
    answer: dict[str, Any] = {"run": ["native", *arguments.cpus]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = run(Path(folder), arguments.folder.resolve(), arguments.architecture, arguments.cpus)
            answer |= {"rounds": outcome["server"]["rounds"], "weights_digest": outcome["digest"], "failed": []}
        except AssertionError as error:
            answer["failed"] = [str(error)]
    print(json.dumps(answer), flush=True)  # noqa: T201
    return MISMATCH if answer["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
