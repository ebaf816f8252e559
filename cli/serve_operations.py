"""What stands beside a run that `fedzo serve` serves: metrics and health, logs, the service manager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..broker_server.history.run_folder import RunFolder
from ..broker_server.server import Server
from ..broker_server.telemetry.event_log import EventLog
from ..broker_server.telemetry.health import Health
from ..broker_server.telemetry.http_endpoint import HttpEndpoint, is_loopback, parse_address
from ..broker_server.telemetry.joining import Joining
from ..broker_server.telemetry.live_file import noted
from ..broker_server.telemetry.observer import Telemetry, Turn, Watchers
from ..edge_runtime.installation.service import ServiceManager
from ..protocol.errors import ConfigError
from .output import Output

__all__ = ["Operations"]


class _Feeder:
    """Tells the service manager that the server's loop turns."""

    def __init__(self, service: ServiceManager) -> None:
        self._service = service

    def turn(self, turn: Turn) -> None:  # noqa: ARG002 (any turn is a sign of life)
        """See :meth:`.telemetry.Telemetry.turn`."""
        self._service.feed()


class Operations:
    """For all runs that one process serves.

    Args:
        output: Gets the endpoint's address.
        metrics: Where to listen, ``HOST:PORT``; None for nowhere.
        stack: Ends what is begun here.

    Raises:
        ConfigError: The address cannot be listened on, or the client library of Prometheus is missing.

    Attributes:
        telemetry: For the servers.
        url: Of the endpoint; empty without one.
    """

    def __init__(self, output: Output, metrics: str | None, stack: ExitStack) -> None:
        self._service, self._stack, self._is_announced = ServiceManager(), stack, False
        self._health = Health()
        self._joining = Joining(output.say, output.warn)
        watchers: list[Telemetry] = [EventLog(), _Feeder(self._service), self._joining]
        self.url, self._metrics = "", None
        if metrics is not None:
            try:
                from ..broker_server.telemetry.metrics import ServerMetrics
            except ImportError:
                raise ConfigError(
                    "--metrics needs prometheus-client, which is not installed", hint="pip install 'fedzo[server]'"
                ) from None
            self._metrics = ServerMetrics()
            watchers.append(self._metrics)
            endpoint = HttpEndpoint(parse_address(metrics), self._health, self._metrics.exposition)
            self.url = stack.enter_context(endpoint).url
            output.say(f"metrics: {self.url}/metrics")
            if not is_loopback(self.url):
                output.warn("whoever reaches this address may read the metrics: there is no password")
        self.telemetry = Watchers(*watchers)

    @contextmanager
    def serving(self, output: Output, server: Server, folder: RunFolder) -> Iterator[None]:
        """While a server serves the run of a folder."""
        if output.logs is not None:
            output.logs.context["run"] = folder.path.name
        self._health.attach(lambda: server.state, folder.journal_path)
        if self._metrics is not None:
            self._metrics.attach(lambda: server.state)
        with noted(folder.path, self.url) as keep:
            self._joining.attach(server.coordinator, keep)
            if not self._is_announced:
                self._is_announced = True
                self._service.ready()
                # After the last run, not after a range test; and before the broker, which the stack has held longer.
                self._stack.callback(self._service.stopping)
            yield
