"""One side of an exchange of whole weights: ``python -m benchmarks.fleet.weights URL SIZE ROUNDS device|server``.

The device publishes ``SIZE`` float32 values, the server answers with as many; that is a round. No announcement and no
receipt go with them, so nothing is counted but what averaging of weights needs at least.
"""

from __future__ import annotations

import json
import queue
import sys
import time

import numpy as np

from fedzo.edge_runtime.connection.transport import Arrived, MqttTransport, TransportEvent

__all__ = ["main"]

UP, DOWN = "fedzo/v1/default/d/board-00000/report", "fedzo/v1/default/log"
PAUSE_S = 0.3


def main(url: str, size: int, rounds: int, side: str) -> None:
    """Be one side."""
    events: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
    payload = np.random.default_rng(1).normal(size=size).astype("<f4").tobytes()
    hears, says = (DOWN, UP) if side == "device" else (UP, DOWN)
    transport = MqttTransport(
        url, f"bench-{side}", on_event=events.put, subscriptions=(hears,), max_packet_bytes=8 << 20
    )
    transport.connect()
    if side == "server":
        print("ready", flush=True)
    starts = []
    for _ in range(rounds + 1):
        time.sleep(PAUSE_S if side == "device" else 0.0)  # the acknowledgements of the last round are in by then
        starts.append(time.time())
        if side == "device":
            transport.publish(says, payload)
        while not isinstance(events.get(timeout=60), Arrived):
            pass
        if side == "server":
            transport.publish(says, payload)
    if side == "device":
        print(json.dumps({"first": starts[0], "last": starts[-1]}))
    transport.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
