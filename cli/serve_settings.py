"""Everything that `fedzo serve` can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..broker_server.telemetry.http_endpoint import parse_address
from ..edge_runtime.logs import LogFormat, LogLevel
from ..protocol.errors import ConfigError
from ..protocol.settings import RunSettings
from ..protocol.wire.topics import check_name

__all__ = ["PATHS", "PLACE", "ServeSettings"]

OPERATIONS = ("metrics", "log_format", "log_file", "log_level")
PLACE = (
    "test_data",
    "test_mean",
    "test_std",
    "test_pad",
    "broker",
    "host",
    "port",
    "federation",
    "username",
    "password_file",
    "ca",
    "credentials",
    *OPERATIONS,
)
PATHS = ("test_data", "password_file", "ca", "credentials", "log_file")
MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ServeSettings(RunSettings):
    """A run's settings and where it is served.

    Attributes:
        artifact: Folder of ``fedzo export``.
        resume: Folder of the run to go on with.
        runs: Where run folders lie.
        run: Run id.
        test_data: The server's own test set.
        test_mean: Subtracted from its inputs, as ``fedzo-device join --mean`` does with those of a board.
        test_std: What its inputs are divided by.
        test_pad: Center smaller images in zeros.
        broker: ``auto``, ``mosquitto``, ``embedded`` or a URL.
        host: Address that a managed broker listens on.
        port: Its port.
        federation: Topic level.
        username: Of the server, for a broker by URL.
        password_file: Its password.
        ca: CA of a ``mqtts://`` broker.
        credentials: Folder of ``fedzo credentials``: TLS, logins and rights of the broker, the run's key.
        metrics: ``HOST:PORT`` to serve metrics and health at; None for nowhere.
        log_format: ``text`` for people, ``json`` for one object a line.
        log_file: Where the log goes instead of stderr.
        log_level: The least; by default ``warning`` for text on stderr, else ``info``.
        continue_run: Go on with the run of this name if it has begun.
    """

    artifact: Path | None = None
    resume: Path | None = None
    runs: Path = Path("runs")
    run: str | None = None
    test_data: Path | None = None
    test_mean: tuple[float, ...] = ()
    test_std: tuple[float, ...] = ()
    test_pad: bool = False
    broker: str = "auto"
    host: str = "127.0.0.1"
    port: int = 1883
    federation: str = "default"
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    credentials: Path | None = None
    metrics: str | None = None
    log_format: LogFormat = "text"
    log_file: Path | None = None
    log_level: LogLevel | None = None
    continue_run: bool = False

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        check_name("federation", self.federation)
        if self.run is not None:
            check_name("run", self.run)
        if not 0 <= self.port <= MAX_PORT:
            raise ConfigError(f"the port is {self.port}, it must be 0 to {MAX_PORT}", setting="port")
        if self.test_data is None and (self.test_mean or self.test_std or self.test_pad):
            raise ConfigError(
                "there are a mean, a deviation or padding for test data, but no test data", hint="give --test-data too"
            )
        if self.metrics is not None:
            parse_address(self.metrics)

    def run_settings(self) -> RunSettings:
        """The part that the devices must know."""
        return RunSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunSettings)})

    def place(self) -> dict[str, Any]:
        """The part that a resumed run takes over; paths are absolute."""
        values = {name: getattr(self, name) for name in PLACE}
        return {n: str(v.resolve()) if isinstance(v, Path) else v for n, v in values.items() if v is not None}
