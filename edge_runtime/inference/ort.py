"""The one place where ONNX Runtime is imported, and how a session is made so that its memory can be planned.

Settings, each with its reason:

* ``ORT_DISABLE_TELEMETRY=1`` before the import: stock Linux wheels from 1.29 on contact a server and write an
  identifier to the user's cache folder otherwise.
* A registered arena with ``arena_extend_strategy`` = as requested, a limit, and no memory pattern: the defaults keep
  about twice the live activations.
* ``enable_mem_reuse`` off: reuse that is planned ahead keeps a buffer allocated until the node that takes it over, a
  third more for ResNet-20. Without it tensors are taken from the arena when needed and given back at once.
* ``execution_order = PRIORITY_BASED``: follows the order of the file, so a dense weight lives only between its scatter
  and its use. The default order runs every scatter first and holds the whole dense model.
* No graph optimisation: the other levels are within 3 % of its time on LeNet-5 and ResNet-20, as weights are inputs,
  and constant folding turns the zeros below each scatter into resident tensors, up to 1.4 times the arena.
* No spinning: an idle worker thread of a board burns a core otherwise.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...protocol.errors import ArtifactError, ConfigError, FedzoError, MemoryBudgetError
from ..planning.resident import release_code, trim_heap
from ..storage.artifact import Artifact
from .providers import CPU, PROVIDER_OPTIONS

__all__ = [
    "CPU",
    "LAYOUT_KEY",
    "arena_limit_holds",
    "available_providers",
    "chosen_providers",
    "mapped_error",
    "open_session",
    "provider_in_use",
    "release_arena",
    "runtime",
    "runtime_version",
    "sessions_kept",
    "sessions_stay",
]

_log = logging.getLogger(__name__)

LAYOUT_KEY = "fedzo.layout_digest"

_AS_REQUESTED = 1
_FATAL = 4
_lock = threading.Lock()
_in_use = ""
_kept: dict[tuple[bytes, str, int, int | None, tuple[str, ...], bool], Any] | None = None
_wrap: Callable[[Any], Any] | None = None
_OUT_OF_MEMORY = ("available memory of", "bad_alloc", "failed to allocate memory", "out of memory")


def runtime() -> Any:
    """The module ``onnxruntime``, imported at the first call with its telemetry off.

    Raises:
        ConfigError: It is not installed, or it cannot be loaded on this machine.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"onnxruntime cannot be imported: {error}",
            hint="pip install onnxruntime; on 32-bit Arm with Debian 13: apt install python3-onnxruntime",
        ) from error
    return onnxruntime


def runtime_version() -> str:
    """Version of the installed ONNX Runtime, such as ``1.32.0``."""
    return str(runtime().__version__)


def available_providers() -> list[str]:
    """Execution providers that this build lists; a listed one may still fail to start."""
    return list(runtime().get_available_providers())


def open_session(
    artifact: Artifact,
    name: str,
    *,
    threads: int,
    arena_bytes: int | None,
    providers: Sequence[str],
    strict_providers: bool,
) -> Any:
    """Make an ``InferenceSession`` of one graph whose tensors come out of an arena of its own.

    ONNX Runtime ties the arena of the environment to a session when that is made, so the arena is registered anew
    for each session. Releases before 1.23 cannot do that and get one arena without a limit: there the plan is not
    enforced, see :func:`arena_limit_holds`.

    Args:
        artifact: Where the graph is read from, with its hash checked.
        name: File name of the graph.
        threads: Threads within an operator.
        arena_bytes: Largest size of the arena; ``None`` for no limit.
        providers: Execution providers in order of preference.
        strict_providers: Refuse a session that silently fell back to another provider.

    Raises:
        ArtifactError: The graph is no valid model, or it belongs to another layout than the manifest's.
        ConfigError: A provider is unknown, or ``strict_providers`` and the first provider did not start.
        MemoryBudgetError: There is not enough memory to load the graph.
    """
    key = (artifact.digest, name, threads, arena_bytes, tuple(providers), strict_providers)
    if _kept is not None and key in _kept:
        return _kept[key]
    ort = runtime()
    release_code()  # of the imports, or of the graph before
    model = artifact.read_graph(name)
    chosen = chosen_providers(providers, strict_providers)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _lock:
        _register_arena(arena_bytes or 0)
        try:
            with warnings.catch_warnings():
                # An unavailable provider is only a warning there; it is checked below.
                warnings.simplefilter("ignore", UserWarning)
                session = ort.InferenceSession(
                    model, options, providers=[(p, PROVIDER_OPTIONS.get(p, {})) for p in chosen]
                )
        except Exception as error:
            raise mapped_error(error, f"{name} of {artifact.source} cannot be loaded") from error
    _check_provider(session.get_providers()[0], chosen[0] if strict_providers else "", providers[0])
    _check_layout(session, artifact, name)
    del model
    release_code()  # what loads a graph is not what runs it
    if _kept is not None:
        session = _kept[key] = session if _wrap is None else _wrap(session)
    return session


@contextmanager
def sessions_kept(wrap: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Inside, sessions stay loaded and are handed out again, to whoever asks for the same graph with the same limits.

    A board loads one graph at a time to save memory. A process that computes for many devices in turn would load the
    same graphs again and again. Of the process, like the arena; not to be nested.

    Args:
        wrap: Gets every new session and returns what takes its place, for example to measure the time in it.
    """
    global _kept, _wrap  # noqa: PLW0603 (of the process, as the arena is)
    _kept, _wrap = {}, wrap
    try:
        yield
    finally:
        _kept = None
        release_arena()


def sessions_stay() -> bool:
    """Whether sessions stay loaded, see :func:`sessions_kept`."""
    return _kept is not None


def release_arena() -> None:
    """Drop the registered arena, so that the memory of closed sessions goes back to the system."""
    if _kept is not None:
        return
    with _lock:
        _register_arena(0)
    trim_heap()


def arena_limit_holds() -> bool:
    """Whether this ONNX Runtime enforces ``arena_bytes``.

    Up to 1.22 the first arena of a process stays for good (tried with 1.19.2, 1.21.1 and 1.22.1; replaced in 1.23.2
    and 1.32.0), so a limit made for one graph would refuse the next one.
    """
    major, minor = (int(part) for part in runtime_version().split(".")[:2])
    return (major, minor) >= (1, 23)


def mapped_error(error: Exception, what: str) -> FedzoError:
    """An exception of ONNX Runtime as one of fedzo's; ``what`` begins the message."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        position = text.lower().find("available memory of")
        return MemoryBudgetError(
            f"{what}: {text[position:][:160] if position >= 0 else 'no memory left'}",
            hint=(
                "use a smaller micro-batch; a larger ram_budget_mib does not raise this limit, which the plan of the"
                " artifact sets: export the model again, if this comes back with a micro-batch of 1"
                if position >= 0
                else "use a smaller micro-batch or a larger ram_budget_mib"
            ),
        )
    return ArtifactError(
        f"{what}: {text[:300]}", hint=f"onnxruntime {runtime_version()} refused the graph; try `fedzo-device doctor`"
    )


def provider_in_use() -> str:
    """Execution provider that the latest session of this process prefers; empty before there is one."""
    return _in_use


def chosen_providers(providers: Sequence[str], strict: bool) -> list[str]:
    """Those of ``providers`` that this build has, and the CPU, which runs what no other one can.

    Raises:
        ConfigError: It has none of them, or ``strict`` and one is absent.
    """
    listed = available_providers()
    chosen = [name for name in providers if name in listed]
    absent = [name for name in providers if name not in listed]
    if not providers or (absent and (strict or not chosen)):
        raise ConfigError(
            f"execution providers {', '.join(absent) or '(none)'} are not in this onnxruntime build",
            hint=f"it has {', '.join(listed)}",
        )
    return chosen if CPU in chosen else [*chosen, CPU]


def _check_provider(taken: str, required: str, wanted: str) -> None:
    """Note what a session runs on, which ONNX Runtime decides silently, and say when it is not the wanted one."""
    global _in_use  # noqa: PLW0603 (of the process, as the module onnxruntime is)
    if required and taken != required:
        raise ConfigError(
            f"provider {required} did not start, the session runs on {taken}",
            hint=f"install the driver that {required} needs, or drop it from the providers",
        )
    if taken != _in_use:
        say = _log.info if taken == wanted else _log.warning
        say("graphs run on %s%s", taken, "" if taken == wanted else f", {wanted} is not there or did not start")
    _in_use = taken


def _register_arena(limit: int) -> None:
    ort = runtime()
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {
        "arena_extend_strategy": _AS_REQUESTED,
        "initial_chunk_size_bytes": 4096,
        "max_mem": limit if arena_limit_holds() else 0,
    }
    try:
        ort.create_and_register_allocator(kind, ort.OrtArenaCfg(settings))
    except RuntimeError as error:
        if "already been registered" not in str(error):
            raise mapped_error(error, "the memory arena cannot be made") from error


def _check_layout(session: Any, artifact: Artifact, name: str) -> None:
    properties = session.get_modelmeta().custom_metadata_map
    digest = artifact.manifest.layout.digest.hex()
    if properties.get(LAYOUT_KEY) != digest:
        raise ArtifactError(
            f"{name} says layout {str(properties.get(LAYOUT_KEY))[:16]}, the manifest says {digest[:16]}",
            hint="the graph belongs to another model: export again",
        )
