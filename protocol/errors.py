"""The exception tree of fedzo.

::

    FedzoError                 exit 1   anything that fedzo itself raises
    ├── ConfigError            exit 3   a setting, profile or file of the user's is wrong
    │   └── DataError          exit 3   training data that cannot be used
    ├── MemoryBudgetError      exit 4   the plan does not fit the board's budget
    ├── BrokerError            exit 5   no broker, no TLS, no rights
    ├── ArtifactError          exit 6   a file or message is not what its hash or schema says
    │   └── ProtocolError      exit 6   a message of a peer breaks the protocol
    ├── SelfTestError          exit 7   this machine computes something else than the contract
    └── QuorumError            exit 8   too few devices before a deadline

Exit code 2 is left to the argument parsers, 130 to an interrupt.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BrokerError",
    "ConfigError",
    "DataError",
    "FedzoError",
    "MemoryBudgetError",
    "ProtocolError",
    "QuorumError",
    "SelfTestError",
]


class FedzoError(Exception):
    """Base of every error that fedzo raises on purpose.

    Attributes:
        message: One line that names the value and the limit.
        hint: One line with the next action; may be empty.
        exit_code: What a command ends with when nothing catches the error.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(FedzoError):
    """A setting, a profile or a path given by the user cannot be used.

    Attributes:
        setting: Field of the settings class that the message is about, as far as that is one; else empty.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", setting: str = "") -> None:
        super().__init__(message, hint=hint)
        self.setting = setting


class DataError(ConfigError):
    """Training data is missing, malformed, non-finite or out of range."""


class MemoryBudgetError(FedzoError):
    """The planned peak is over the RAM budget of the hardware profile."""

    exit_code = 4


class BrokerError(FedzoError):
    """The broker cannot be started, reached or used."""

    exit_code = 5


class ArtifactError(FedzoError):
    """A file is missing, truncated, or not the one that its hash names."""

    exit_code = 6


class ProtocolError(ArtifactError):
    """A message of a peer breaks the protocol; it changes nothing and is dropped."""


class SelfTestError(FedzoError):
    """A known-answer test failed: this machine cannot take part in a run."""

    exit_code = 7


class QuorumError(FedzoError):
    """Fewer devices than the quorum were there when a deadline passed."""

    exit_code = 8
