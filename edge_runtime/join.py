"""``fedzo-device join``: settings into an agent, its progress to stderr, its summary to stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import signal
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..protocol.errors import ConfigError
from ..protocol.wire.documents import Hello
from ..protocol.wire.topics import check_name
from .agent import Agent, Connection, Summary
from .connection.endpoint import Endpoint, TlsConfig, read_password
from .datasets.data import Dataset, count_samples, load_dataset
from .inference.providers import CPU, provider_names
from .installation.device_bundle import DeviceBundle
from .installation.service import ServiceManager
from .installation.versions import installed_versions
from .logs import LogFormat
from .planning.memory import total_mib
from .storage.run_key import RunKey, parse_run_key
from .storage.state import DeviceState
from .worker import Limits

__all__ = ["JoinSettings", "Stopped", "join"]

_DATA_LIMIT_MIB = 2048
_IN_A_BUNDLE = ("username", "password_file", "ca", "cert", "key")


class Stopped(BaseException):
    """Somebody interrupted the agent with Ctrl-C; it has left cleanly."""


@dataclass(frozen=True)
class JoinSettings:
    """Everything that ``fedzo-device join`` can be told.

    Attributes:
        url: The broker, ``mqtt://HOST[:1883]`` or ``mqtts://HOST[:8883]``.
        data: Training data, see :func:`~.datasets.data.load_dataset`.
        federation: Name of the federation.
        id: Device id; made once and kept when None.
        ram_budget_mib: What the whole process may use; the machine's memory when None.
        threads: Threads within an operator.
        micro_batch: Samples of one run of a graph; chosen to fit when None.
        state: State folder; see :func:`~.storage.state.default_folder`.
        holdout: Fraction of the training samples to keep for evaluation, when the data have no test part.
        mean: Subtracted from every input, one number or one a channel.
        std: What inputs are divided by, one number or one a channel.
        pad: Center images that are smaller than the model's input in zeros.
        username: MQTT user; the device id when there is a password.
        password_file: Its first line is the password; else ``FEDZO_PASSWORD``.
        ca: Certificates that may sign the broker's.
        cert: The device's certificate.
        key: The device's private key.
        connect_timeout: Seconds for the first connection; None to try for ever.
        retry: Seconds after which an unanswered request is repeated.
        profile: Name or path of the hardware profile; empty for this machine as it is.
        providers: Execution providers in order of preference, ``cuda`` or ``CUDAExecutionProvider``.
        strict_providers: Refuse a run when the first one does not start, instead of computing with the next.
        log_format: ``text`` for people, ``json`` for one object a line.
        log_file: Where the log goes instead of stderr; rotated, see :mod:`.logs`.
        credentials: Folder that ``fedzo credentials issue`` made for this device: id, federation, password,
            certificates and the run's key.
        run_key: Public key that runs must be signed with, 64 hex digits; that of the first run that answers when None.
    """

    url: str
    data: Path
    federation: str = "default"
    id: str | None = None
    ram_budget_mib: float | None = None
    threads: int = 1
    micro_batch: int | None = None
    state: Path | None = None
    holdout: float = 0.2
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pad: bool = False
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    connect_timeout: float | None = None
    retry: float = 5.0
    profile: str = ""
    providers: tuple[str, ...] = (CPU,)
    strict_providers: bool = False
    log_format: LogFormat = "text"
    log_file: Path | None = None
    credentials: Path | None = None
    run_key: str | None = None

    def __post_init__(self) -> None:
        Endpoint.parse(self.url)
        check_name("federation", self.federation)
        if self.id is not None:
            check_name("device id", self.id)
        provider_names(self.providers)
        _check("ram_budget_mib", self.ram_budget_mib, above=0.0)
        _check("threads", self.threads, above=0)
        _check("micro_batch", self.micro_batch, above=0)
        _check("connect_timeout", self.connect_timeout, above=0.0)
        _check("retry", self.retry, above=0.0)
        if self.run_key is not None:
            parse_run_key(self.run_key)
        doubled = [name for name in _IN_A_BUNDLE if getattr(self, name) is not None]
        if self.credentials is not None and doubled:
            raise ConfigError(
                f"{doubled[0]} is given besides the credentials folder, which has its own",
                hint="leave one of both away",
            )
        if not 0.0 <= self.holdout < 1.0:
            raise ConfigError(f"holdout is {self.holdout}, it must be at least 0 and below 1")

    @property
    def budget_mib(self) -> float:
        """What the process may use."""
        return self.ram_budget_mib or total_mib() or float("inf")


def _check(name: str, value: float | None, *, above: float) -> None:
    if value is not None and not above < value < 1e9:
        raise ConfigError(f"{name} is {value}, it must be above {above:g} and below 1e9")


def join(
    settings: JoinSettings,
    *,
    say: Callable[[str], None],
    done: Callable[[Summary], None],
    context: MutableMapping[str, str] | None = None,
) -> None:
    """Take part in a run, to its end or to a signal.

    Args:
        settings: Checked settings.
        say: Takes lines for people.
        done: Takes the summary when the agent ends, also when it ends with an error.
        context: Gets the ``device`` id, for log lines.

    Raises:
        Stopped: After Ctrl-C (SIGINT); after SIGTERM it returns.
        FedzoError: The data, the broker, the memory or the run is not usable.
    """
    budget_mib = settings.budget_mib
    limit_mib = max(1, int(min(_DATA_LIMIT_MIB, budget_mib)))
    train, held = count_samples(settings.data, holdout=settings.holdout, limit_mib=limit_mib)
    settings, connection, run_key = _credentials(settings)

    def load(input_shape: tuple[int, ...], n_classes: int) -> Dataset:
        return load_dataset(
            settings.data,
            input_shape,
            n_classes,
            holdout=settings.holdout,
            mean=settings.mean,
            std=settings.std,
            pad=settings.pad,
            limit_mib=limit_mib,
        )

    with DeviceState(settings.state, federation=settings.federation, device=settings.id) as state:
        hello = Hello(
            session=state.session,
            profile=settings.profile,
            ram_budget_mib=min(budget_mib, 1e12),
            samples=train,
            holdout=held,
            versions=", ".join(f"{name} {version}" for name, version in installed_versions().items()),
            machine=platform.machine(),
        )
        limits = Limits(
            budget_mib,
            settings.threads,
            settings.micro_batch,
            provider_names(settings.providers),
            settings.strict_providers,
            fence=True,
        )
        if context is not None:
            context["device"] = state.device
        agent = Agent(
            state,
            hello,
            load,
            connection,
            limits,
            service=ServiceManager(),
            federation=settings.federation,
            retry_s=settings.retry,
            say=say,
            run_key=RunKey(
                state.folder / "run-key", settings.federation, state.device, state.session, given=run_key, say=say
            ),
        )
        say(f"device {state.device}: {train} training and {held} test samples, session {state.session}")
        try:
            with _signals_to(agent) as received:
                agent.run()
        finally:
            done(agent.summary)
        if signal.SIGINT in received:
            raise Stopped


def _credentials(settings: JoinSettings) -> tuple[JoinSettings, Connection, bytes | None]:
    """Settings with the names that the credentials folder fixes, how to connect, and the key to trust."""
    given = None if settings.run_key is None else parse_run_key(settings.run_key)
    if settings.credentials is None:
        files = settings.ca or settings.cert or settings.key
        tls = TlsConfig(settings.ca, settings.cert, settings.key) if files else None
        password = read_password(settings.password_file)
        return settings, Connection(settings.url, settings.username, password, tls, settings.connect_timeout), given
    bundle = DeviceBundle.load(settings.credentials)
    if settings.id not in (None, bundle.device):
        raise ConfigError(
            f"the credentials are those of the device {bundle.device}, not of {settings.id}", hint="leave --id away"
        )
    if settings.federation not in ("default", bundle.federation):
        raise ConfigError(
            f"the credentials are for the federation {bundle.federation}, not for {settings.federation}",
            hint="leave --federation away",
        )
    if not Endpoint.parse(settings.url).tls:
        raise ConfigError(
            f"the credentials would cross the network readable: {Endpoint.parse(settings.url)} is no mqtts:// URL",
            hint="use mqtts://HOST[:8883]",
        )
    connection = Connection(settings.url, bundle.device, bundle.password, bundle.tls, settings.connect_timeout)
    settings = dataclasses.replace(settings, id=bundle.device, federation=bundle.federation)
    return settings, connection, given or bundle.run_key


@contextlib.contextmanager
def _signals_to(agent: Agent) -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT asks the agent to leave, the second one ends the process.

    Yields:
        The signals so far.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        agent.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
