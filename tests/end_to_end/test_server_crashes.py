"""The server, its broker or both are killed at the worst moments; resumed, the run ends as if nothing had happened."""

from __future__ import annotations

import signal

from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree

# In the order in which a run passes them; the counts start again with every process.
POINTS = (
    "after:enrolment:1",
    "before:announce:1",
    "after:announce:1",
    "after:report:1",
    "before:mask:1",
    "after:mask:1",
    "after:report:2",
    "before:update:1",
    "after:update:1",
    "sent:log:1",
    "before:evaluation:1",
    "after:evaluation:1",
    "sent:ack:2",
    "sent:head:3",
    "before:phase:1",
)


def test_the_server_is_killed_at_every_kind_of_point(
    undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str
) -> None:
    """The broker and the devices go on; the server's next process dies a little later in the run."""
    fleet = fleets(url=mosquitto_url)
    devices = fleet.devices()
    server = fleet.serve(crash=POINTS[0])
    for point in (*POINTS[1:], ""):
        assert server.wait() == -signal.SIGKILL, (point, server.stdout, server.stderr)
        server = fleet.resume(crash=point)
    answer = server.answer()
    assert agree(answer, [device.answer() for device in devices]) == undisturbed.digest
    # Nothing was lost and nothing counted twice.
    assert answer["reports"] == undisturbed.server["reports"]
    assert answer["refused"] == 0


def test_a_finished_run_is_over_at_once(undisturbed: Finished) -> None:
    fleet = undisturbed.fleet
    before = len(fleet.entries())
    answer = fleet.resume().answer(timeout_s=20.0)
    assert (answer["phase"], answer["weights_digest"]) == ("done", undisturbed.digest)
    # What the devices said at their end is in the journal as well.
    assert answer["digests_agree"] is True
    assert answer["accuracy"] == undisturbed.server["accuracy"]
    assert len(fleet.entries()) == before
