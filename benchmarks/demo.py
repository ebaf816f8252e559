"""Accuracy and cost of the demo over several seeds: real device processes, a real broker.

python -m benchmarks.demo --json > docs/results/demo.json
python -m benchmarks.demo --from docs/results/demo.json --picture docs/images/demo.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Report

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 340, 56, 44, 48, 110
TITLE = "Held-out accuracy of the demo, %: LeNet-5, 80 % pruned, forward passes only"
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def measure(seeds: Sequence[int], rounds: int, devices: int) -> Report:
    """Run the demo once a seed.

    Raises:
        subprocess.CalledProcessError: A run failed.
    """
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(DEMO), "--json", "--seed", str(seed), "--rounds", str(rounds)]
            command += ["--devices", str(devices), "--output", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        row: dict[str, Any] = json.loads(done.stdout)
        row.pop("deployed_model")
        rows.append({"seed": seed, **row})
    figures = {
        f"demo_{name}_median": float(statistics.median(row[key] for row in rows))
        for name, key in (
            ("accuracy", "accuracy"),
            ("wall_s", "wall_s"),
            ("bytes_up", "bytes_up_per_device_round"),
            ("bytes_down", "bytes_down_per_device_round"),
            ("device_peak_rss_mib", "device_peak_rss_mib"),
        )
    }
    figures["demo_digests_agree"] = float(all(row["digests_agree"] for row in rows))
    return Report({"seeds": list(seeds), "rounds": rounds, "devices": devices, "data": "digits"}, rows, figures)


def picture(rows: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """Accuracy over updates, one line a seed, as SVG text."""
    x_scale, y_scale = (WIDTH - LEFT - RIGHT) / rounds, (HEIGHT - TOP - BOTTOM) / 100

    def place(update: float, percent: float) -> str:
        return f"{LEFT + update * x_scale:.1f},{HEIGHT - BOTTOM - percent * y_scale:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        '<g font-family="sans-serif" font-size="13" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="14">{TITLE}</text>',
    ]
    for percent in range(0, 101, 20):
        y = HEIGHT - BOTTOM - percent * y_scale
        lines.append(f'<path d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for part in range(7):
        update = rounds * part / 6
        x = LEFT + update * x_scale
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{update:.0f}</text>')
    lines.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">updates (rounds)</text>'
    )
    # Labels at the right end, pushed apart so that close lines stay readable.
    ends = sorted((-100 * row["curve"][-1][1], number) for number, row in enumerate(rows))
    label_y: dict[int, float] = {}
    lowest = 0.0
    for negative, number in ends:
        lowest = max(lowest + 16, HEIGHT - BOTTOM + negative * y_scale + 4)
        label_y[number] = lowest
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(place(update, 100 * accuracy) for update, accuracy in row["curve"])
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        text = f"seed {row['seed']}: {100 * row['curve'][-1][1]:.1f}"
        lines.append(f'<text x="{WIDTH - RIGHT + 8}" y="{label_y[number]:.1f}" fill="{colour}">{text}</text>')
    return "\n".join([*lines, "</g></svg>", ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=350)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--from", dest="committed", type=Path, help="use this result instead of running")
    parser.add_argument("--picture", type=Path, help="write the accuracy over updates as SVG")
    arguments = parser.parse_args()
    if arguments.committed is not None:
        data = json.loads(arguments.committed.read_text(encoding="utf-8"))
        report = Report(data["settings"], data["rows"], data["figures"])
    else:
        report = measure(arguments.seeds, arguments.rounds, arguments.devices)
        report.write(as_json=arguments.json)
    if arguments.picture is not None:
        text = picture(report.rows, int(report.settings["rounds"]))
        arguments.picture.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
