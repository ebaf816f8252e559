"""The whole path on one machine: export, broker, server, eight device processes, deploy.

LeNet-5 at 80 % sparsity learns scikit-learn's digits (real 8x8 images, enlarged to 32x32) by forward passes only.
Every device is a process of its own with its own skewed share of the images (Dirichlet 0.5); it talks to the server
over MQTT and nothing else. Run it with ``scripts/demo``, or ``python examples/demo.py --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fedzo.cli.output import Output
from fedzo.edge_runtime.datasets.partition import partition_dirichlet
from fedzo.protocol.errors import FedzoError

TEST_SAMPLES = 360
KEYS = (
    "accuracy",
    "rounds",
    "queries",
    "bytes_up_per_device_round",
    "bytes_down_per_device_round",
    "device_peak_rss_mib",
    "wall_s",
    "weights_digest",
    "digests_agree",
    "deployed_model",
)


def parse_arguments() -> argparse.Namespace:
    """The demo's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="device processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=350, help="updates (default: %(default)s)")
    parser.add_argument("--estimator", default="node", help="stein, split or node (default: %(default)s)")
    parser.add_argument("--k", type=int, default=9, help="directions per device and round (default: %(default)s)")
    parser.add_argument("--tail-k", type=int, default=1900, help="scalars of the sketch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples a device and round (default: %(default)s)")
    parser.add_argument("--probe-batch", type=int, default=4, help="samples a direction (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=7e-3, help="peak (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="weights to prune (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="Dirichlet skew of the labels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, split and run (default: %(default)s)")
    parser.add_argument("--broker", default="auto", help="auto, mosquitto or embedded (default: %(default)s)")
    parser.add_argument("--profile", default="rpi-zero-2w", help="board whose RAM budget holds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for the run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    return parser.parse_args()


def write_data(folder: Path, devices: int, alpha: float, seed: int) -> tuple[list[Path], Path]:
    """Split the digits: one file a device, and the server's held-out test file."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    small = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    images: NDArray[np.uint8] = small.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    labels = digits.target[order].astype(np.int64)
    test = folder / "test.npz"
    np.savez_compressed(test, x=images[:TEST_SAMPLES], y=labels[:TEST_SAMPLES])
    images, labels = images[TEST_SAMPLES:], labels[TEST_SAMPLES:]
    paths = []
    for number, members in enumerate(partition_dirichlet(labels, devices, alpha, seed)):
        paths.append(folder / f"device-{number}.npz")
        np.savez_compressed(paths[-1], x=images[members], y=labels[members])
    return paths, test


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fedzo(*arguments: object, quiet: bool = False) -> dict[str, Any]:
    """Run a ``fedzo`` command to its end and return its JSON answer.

    Raises:
        FedzoError: It failed; with its message, hint and exit code.
    """
    command = [sys.executable, "-m", "fedzo.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if quiet else None, check=False)
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode != 0:
        found = answer.get("error", {"message": f"ended with exit code {done.returncode}", "hint": ""})
        error = FedzoError(f"fedzo {arguments[0]}: {found['message']}", hint=found["hint"])
        error.exit_code = done.returncode
        raise error
    return answer


def start_devices(
    stack: ExitStack, arguments: argparse.Namespace, data: list[Path], url: str, folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Start one process a device; the stack ends those that are left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes = []
    for number, path in enumerate(data):
        log = stack.enter_context((folder / f"device-{number}.log").open("wb"))
        command = [sys.executable, "-m", "fedzo.edge_runtime", "join", url, "--data", path, "--id", f"board-{number}"]
        command += ["--profile", arguments.profile, "--state", folder / f"state-{number}", "--threads", "1", "--json"]
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        stack.callback(process.kill)
        processes.append(process)
    return processes


def run(arguments: argparse.Namespace, output: Output, folder: Path) -> dict[str, Any]:
    """Export, serve, train, deploy; return the numbers."""
    started = time.monotonic()
    output.say(f"1/4 splitting the digits over {arguments.devices} devices (Dirichlet {arguments.alpha:g})")
    data, test = write_data(folder, arguments.devices, arguments.alpha, arguments.seed)
    output.say(f"2/4 exporting LeNet-5 at {arguments.sparsity:.0%} sparsity")
    artifact = folder / "artifact"
    options = ("--sparsity", arguments.sparsity, "--seed", arguments.seed, "-o", artifact)
    fedzo("export", "lenet5", "--input", "1x32x32", "--classes", 10, *options, quiet=True)
    output.say(f"3/4 pruning and training on {arguments.devices} device processes")
    with ExitStack() as stack:
        port = free_port()
        start_devices(stack, arguments, data, f"mqtt://127.0.0.1:{port}", folder)
        quorum = max(1, arguments.devices - 2)
        rounds = ("--devices", arguments.devices, "--quorum", quorum, "--rounds", arguments.rounds)
        training = (
            *("--estimator", arguments.estimator, "--k", arguments.k, "--tail-k", arguments.tail_k),
            *("--batch", arguments.batch, "--probe-batch", arguments.probe_batch),
            *("--learning-rate", arguments.learning_rate),
        )
        place = ("--broker", arguments.broker, "--port", port, "--runs", folder / "runs", "--run", "digits")
        every = max(1, arguments.rounds // 20)
        summary = fedzo(
            "serve",
            artifact,
            "--test-data",
            test,
            "--seed",
            arguments.seed,
            "--evaluate-every",
            every,
            *rounds,
            *training,
            *place,
        )
    output.say("4/4 deploying a plain ONNX model")
    model = arguments.output / "demo-model.onnx"
    deployed = fedzo("deploy", summary["folder"], "-o", model, "--overwrite", quiet=True)
    numbers = {**summary, "wall_s": round(time.monotonic() - started, 1), "deployed_model": str(model)}
    return {**{key: numbers[key] for key in KEYS}, "deployed_bytes": deployed["size_bytes"], "curve": summary["curve"]}


def show(output: Output, numbers: dict[str, Any]) -> None:
    """The table at the end."""
    rows: list[tuple[str, object]] = [
        ("held-out accuracy", f"{numbers['accuracy']:.1%}"),
        ("rounds", numbers["rounds"]),
        ("loss queries, all devices", numbers["queries"]),
        ("bytes up per device and round", f"{numbers['bytes_up_per_device_round']:.0f}"),
        ("bytes down per device and round", f"{numbers['bytes_down_per_device_round']:.0f}"),
        ("peak RSS of a device", f"{numbers['device_peak_rss_mib']} MiB"),
        ("same weights on every device", "yes" if numbers["digests_agree"] else "NO"),
        ("weights digest", numbers["weights_digest"]),
        ("deployed model", f"{numbers['deployed_model']} ({numbers['deployed_bytes'] / 1024:.0f} KiB)"),
        ("seconds", numbers["wall_s"]),
    ]
    output.table(("demo", "result"), rows)


def main() -> int:
    """Run the demo; the exit code is that of the error, if there is one."""
    arguments = parse_arguments()
    output = Output(json=arguments.json)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=arguments.output))
    try:
        numbers = run(arguments, output, folder)
    except FedzoError as error:
        hint = f"{error.hint}; device logs are in {folder}" if error.hint else f"device logs are in {folder}"
        output.error(error.message, hint=hint, exit_code=error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    show(output, numbers)
    output.result(numbers)
    if not numbers["digests_agree"]:
        output.warn(f"not every device has the server's weights; journal and logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
