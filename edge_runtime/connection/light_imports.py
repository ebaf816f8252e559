"""Imports that pull in less: paho-mqtt without OpenSSL and HTTP, hashlib without OpenSSL.

paho-mqtt imports ``ssl`` and ``urllib.request`` (with ``http`` and ``email``) whether or not they are needed; OpenSSL
and they cost a device 6 MiB. Here ``ssl`` is imported when a URL asks for TLS, and ``urllib.request`` only where the
optional package PySocks is installed: then paho looks for proxies, at every connect.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["hashlib_without_openssl", "not_needed_by_paho", "stand_ins"]


class _UnraisedError(OSError):
    """Stands for an exception of a module that is not loaded, so nobody can raise it."""


class _StandIn(ModuleType):
    """Names of a module that is loaded when one of them is first needed.

    paho names the two exceptions below in ``except`` clauses, which plain connections evaluate as well: until
    ``ssl`` is loaded by somebody else, they stand for themselves.
    """

    _unraised = ("SSLWantReadError", "SSLWantWriteError")

    def __getattr__(self, name: str) -> Any:
        loaded = sys.modules.get(self.__name__)
        if loaded is None or loaded is self:
            if name in self._unraised:
                return _UnraisedError
            if name.startswith("__"):  # what the import system asks for
                raise AttributeError(name)
            loaded = importlib.import_module(self.__name__)
        return getattr(loaded, name)


def not_needed_by_paho() -> tuple[str, ...]:
    """What paho imports and a plain connection does not use.

    A stand-in is no attribute of its package, so ``urllib.request`` must be the real one where paho reads it.
    """
    return ("ssl",) if importlib.util.find_spec("socks") is not None else ("ssl", "urllib.request")


@contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """While this holds, an import of one of ``names`` gives a stand-in, unless the module is loaded already."""
    put = {name: _StandIn(name) for name in names if name not in sys.modules}
    for name in put:
        if "." in name:
            importlib.import_module(name.rpartition(".")[0])
    sys.modules.update(put)
    try:
        yield
    finally:
        for name, module in put.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent and vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)


def hashlib_without_openssl() -> bool:
    """Let ``hashlib`` and ``hmac`` use Python's own SHA-256, if they are not loaded yet.

    It is slower, 0.18 against 1.3 GB/s on an x86-64 server, where a device hashes its weights once an update.

    Returns:
        Whether they do; not if this Python has no SHA-256 of its own.
    """
    own = "_sha2" if sys.version_info >= (3, 12) else "_sha256"
    if {"_hashlib", "hashlib", "hmac"} & set(sys.modules) or importlib.util.find_spec(own) is None:
        return False
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # "cannot be imported", as the import system reads it
    try:
        for name in ("hashlib", "hmac"):
            importlib.import_module(name)
    finally:
        del sys.modules["_hashlib"]
    return True
