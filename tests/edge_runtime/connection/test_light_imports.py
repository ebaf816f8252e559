"""What a device does not load, and that it is loaded when it is needed after all."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedzo.edge_runtime.installation.versions import installed_versions

_HEAVY = ("ssl", "http", "email", "urllib.request", "_hashlib", "asyncio", "numpy.testing", "importlib.metadata")


def run(script: str, *path: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))} if path else None
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_device_without_tls_loads_no_openssl_and_no_http() -> None:
    lines = run(
        "import sys\nbefore = set(sys.modules)\n"
        "from fedzo.edge_runtime.connection.light_imports import hashlib_without_openssl\n"
        "hashlib_without_openssl()\n"
        "import fedzo.edge_runtime.join\nfrom fedzo.edge_runtime.installation.versions import installed_versions\n"
        "installed_versions()\n"
        f"print(sorted(set({_HEAVY!r}) & (set(sys.modules) - before)))\n"
        "import hashlib\nprint(hashlib.sha256(b'abc').hexdigest()[:8], hashlib.new('sha256', b'abc').hexdigest()[:8])"
    )
    assert lines == ["[]", "ba7816bf ba7816bf"]


def test_ssl_comes_when_it_is_asked_for() -> None:
    lines = run(
        "import sys\nimport fedzo.edge_runtime.connection.mqtt_link\n"
        "import paho.mqtt.client as paho\n"
        "try:\n    raise BlockingIOError\n"
        "except paho.ssl.SSLWantReadError:\n    print('wrong')\n"
        "except BlockingIOError:\n    print('ssl' in sys.modules)\n"
        "from fedzo.edge_runtime.connection.endpoint import TlsConfig\n"
        "context = TlsConfig().client_context()\nimport ssl\n"
        "print(paho.ssl.SSLWantReadError is ssl.SSLWantReadError, paho.ssl.SSLContext is ssl.SSLContext)\n"
        "import urllib.request\nprint(paho.urllib.request.getproxies is urllib.request.getproxies)"
    )
    assert lines == ["False", "True True", "True"]


def test_paho_finds_a_proxy_where_pysocks_is_installed(tmp_path: Path) -> None:
    # What paho reads of PySocks. Its lookup happens at every connect, with or without a proxy.
    (tmp_path / "socks.py").write_text(
        "SOCKS4, SOCKS5, HTTP = 1, 2, 3\nasked = []\ndef get_default_proxy():\n    asked.append(1)\n"
    )
    lines = run(
        "import socket\nfrom fedzo.edge_runtime.connection.mqtt_link import Client, CallbackAPIVersion\nimport socks\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "client = Client(CallbackAPIVersion.VERSION2)\n"
        "print(client.connect('127.0.0.1', listener.getsockname()[1]).name, len(socks.asked))",
        tmp_path,
    )
    assert lines == ["MQTT_ERR_SUCCESS 1"]


def test_a_stand_in_loads_the_module_for_any_other_name() -> None:
    lines = run(
        "import sys\nfrom fedzo.edge_runtime.connection.light_imports import stand_ins\n"
        "with stand_ins('ssl', 'urllib.request', 'json'):\n"
        "    import json, ssl, urllib.request\n    held = ssl\n"
        "print('ssl' in sys.modules, hasattr(sys.modules['urllib'], 'request'))\n"
        "print(held.CERT_REQUIRED.name, 'ssl' in sys.modules)\n"
        "print(hasattr(held, 'nothing'), hasattr(held, '__path__'))"
    )
    assert lines == ["False False", "CERT_REQUIRED True", "False False"]


def test_a_loaded_module_stays() -> None:
    lines = run(
        "import ssl, hashlib\n"
        "from fedzo.edge_runtime.connection.light_imports import hashlib_without_openssl, stand_ins\n"
        "first = ssl\n"
        "with stand_ins('ssl'):\n    import ssl\n    print(ssl is first)\n"
        "print(hashlib_without_openssl())"
    )
    assert lines == ["True", "False"]


@pytest.mark.parametrize("name", ["numpy", "paho-mqtt", "pytest"])
def test_versions_are_those_of_the_metadata(name: str) -> None:
    assert installed_versions(name)[name] == metadata.version(name)


def test_the_onnxruntime_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime_gpu-1.27.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_versions()["onnxruntime"] == "1.27.0"
    (tmp_path / "onnxruntime-1.26.0.dist-info").mkdir()
    assert installed_versions()["onnxruntime"] == "1.26.0"


def test_what_is_not_installed_is_missing() -> None:
    assert installed_versions("no-such-package")["no-such-package"] == "missing"
