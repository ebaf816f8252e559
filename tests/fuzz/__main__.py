"""Throw hostile payloads at coordinator and boards: ``python -m tests.fuzz --payloads 1000000``.

Ends with 0 when all were survived, with a traceback and the seed of the run otherwise. ``--engine mutate`` damages the
payloads of runs in progress; ``--engine atheris`` (``pip install atheris``) lets libFuzzer find inputs by coverage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedzo.edge_runtime.planning.memory import peak_rss_mib

PER_RUN = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Throw hostile payloads.")
    parser.add_argument("--payloads", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # each payload that is dropped is one of them
    found = Report(options)
    if options.engine == "atheris":
        fuzz_by_coverage(options, found)
    else:
        from tests.fuzz.targets import Federation

        for number in range(-(-options.payloads // PER_RUN)):
            seed, payloads = options.seed + number, min(PER_RUN, options.payloads - number * PER_RUN)
            try:
                Federation(seed, found.counts).under_fire(payloads)
            except BaseException:
                sys.stderr.write(f"in the run of seed {seed}, {payloads} payloads\n")
                raise
            found.note()
    found.show()
    return 0


class Report:
    """What is printed at the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.counts: Counter[str] = Counter()
        self._options, self._began, self._early_mib = options, time.monotonic(), 0.0

    def note(self) -> None:
        """Remember the peak of the first tenth: it must not grow much after that."""
        if not self._early_mib and self.counts["payloads"] * 10 >= self._options.payloads:
            self._early_mib = peak_rss_mib()

    def show(self) -> None:
        result: dict[str, Any] = {
            "engine": self._options.engine,
            **{name: self.counts[name] for name in sorted(self.counts)},
            "seconds": round(time.monotonic() - self._began, 1),
            "peak_rss_mib_after_a_tenth": round(self._early_mib, 1),
            "peak_rss_mib": round(peak_rss_mib(), 1),
        }
        lines = [f"{name}: {value}" for name, value in result.items()]
        sys.stdout.write((json.dumps(result) if self._options.json else "\n".join(lines)) + "\n")
        sys.stdout.flush()


def fuzz_by_coverage(options: argparse.Namespace, found: Report) -> None:
    """Inputs are one byte for the topic and the payload; libFuzzer keeps those that reach new code."""
    import atheris

    with atheris.instrument_imports(include=["fedzo.protocol", "fedzo.broker_server.intake", "fedzo.edge_runtime"]):
        from tests.fuzz.mutations import mutate
        from tests.fuzz.targets import HOSTILE, VICTIM, Federation
        from tests.protocol.simulation.network import FEDERATION

    from fedzo.protocol.wire.topics import FROM_DEVICE, device_subscriptions, topic

    topics = [topic(FEDERATION, channel, HOSTILE[0]) for channel in FROM_DEVICE]
    topics += device_subscriptions(FEDERATION, VICTIM)
    live: list[Federation] = []

    def renew() -> None:
        federation = Federation(options.seed + found.counts["runs"], found.counts)
        federation.start()
        federation.pass_time(3.0 + found.counts["runs"] % 20)
        found.counts["runs"] += 1
        live[:] = [federation]

    def one_input(data: bytes) -> None:
        if found.counts["payloads"] % PER_RUN == 0:
            renew()
        if found.counts["payloads"] % 100 == 0:
            live[0].pass_time(0.02)
        live[0].throw(topics[data[0] % len(topics)] if data else topics[0], data[1:])
        found.note()
        if found.counts["payloads"] >= options.payloads:
            found.show()
            os._exit(0)  # libFuzzer does not return

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        import random

        source = random.Random(seed)
        if source.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        text, payload = live[0].hostile_payload()
        if source.random() < 0.5 and len(data) > 1:
            return (data[:1] + mutate(data[1:], source, payload))[:max_size]
        return (bytes([topics.index(text) if text in topics else source.randrange(256)]) + payload)[:max_size]

    _seeds(topics, renew, live, lambda folder: atheris.Setup(
        [sys.argv[0], f"-max_len={64 << 10}", "-rss_limit_mb=1024", "-timeout=60", "-verbosity=0",
         f"-artifact_prefix={folder}/found-", folder],
        one_input, custom_mutator=mutator,
    ))  # fmt: skip
    atheris.Fuzz()


def _seeds(topics: list[str], renew: Callable[[], None], live: list[Any], setup: Callable[[str], None]) -> None:
    """The corpus to begin with: a good payload of every topic."""
    renew()
    folder = tempfile.mkdtemp(prefix="fedzo-fuzz-")
    for number, (text, payloads) in enumerate(live[0]._good.items()):
        kind = text.rpartition("/")[2]
        index = next((i for i, name in enumerate(topics) if name.endswith(f"/{kind}")), 0)
        (Path(folder) / str(number)).write_bytes(bytes([index]) + payloads[-1])
    setup(folder)


if __name__ == "__main__":
    sys.exit(main())
