"""Servers as processes, their certificates, and a circuit whose functions can be told to sleep and to die."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fhe

HERE = Path(__file__).parent

WIDE = 200_000

# What `crash` dies of.
FATAL = 9


def project(ops: Any, params: Any, x: Any) -> tuple[Any, Any]:
    return ops.lookup(params["table"], ops.matmul(x, params["weight"])), ops.lookup(params["table"], x)


def attend(ops: Any, params: Any, q: Any, k: Any) -> tuple[Any]:
    return (ops.lookup(params["table"], q + k),)


def nap(ops: Any, params: Any, x: Any) -> tuple[Any]:
    """Sleeps a tenth of a second for each unit."""
    time.sleep(float(np.max(x)) / 10)
    return (x + 0,)


def crash(ops: Any, params: Any, x: Any) -> tuple[Any]:
    if np.max(x) == FATAL:
        os.write(2, b"Stack dump, as native code prints it:\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return (x + 0,)


def widen(ops: Any, params: Any, x: Any) -> tuple[Any]:
    """A result of WIDE numbers."""
    return (x + np.zeros((1, WIDE), np.int64),)


PARAMS = {
    "table": fhe.LookupTable(np.arange(-8, 8)[::-1].copy(), low=-8),
    "weight": np.random.default_rng(1).integers(-1, 2, (4, 4)),
}


def small_circuit() -> Any:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(-4, 4, (1, 4)),) for _ in range(8)]
    pairs = [project(fhe.NumpyOps(), PARAMS, *row) for row in rows]
    still = [(np.zeros((1, 1), int),)]
    functions = {
        "project": fhe.Function(project, rows),
        "attend": fhe.Function(attend, pairs, [[fhe.Output("project", 0)], [fhe.Output("project", 1)]]),
        "nap": fhe.Function(nap, still),
        "crash": fhe.Function(crash, still),
        "widen": fhe.Function(widen, still),
    }
    fhe.register_functions(*(function.run for function in functions.values()))
    return fhe.get_backend("clear").compile(functions, PARAMS, fhe.FHEConfig())


def tokens_file(directory: Path, tokens: Mapping[str, str]) -> Path:
    """A file for `serve --tokens`, of tokens by their clients' names."""
    path = directory / "tokens"
    path.write_text("".join(f"{name} {hashlib.sha256(each.encode()).hexdigest()}\n" for name, each in tokens.items()))
    return path


def certificates(directory: Path) -> Path:
    """A directory, now with NAME.pem and NAME.key: of an authority, a server and a client that it vouches for, and a
    stranger."""
    if shutil.which("openssl") is None:
        import pytest  # no server needs it

        pytest.skip("openssl is not installed")

    def certificate(name: str, *more: object) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                   "-subj", f"/CN={name}", "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.pem",
                   *more]  # fmt: skip
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    certificate("authority")
    signed = ["-CA", directory / "authority.pem", "-CAkey", directory / "authority.key"]
    certificate("server", "-addext", "subjectAltName=IP:127.0.0.1", *signed)
    certificate("client", *signed)
    certificate("stranger")
    return directory


@dataclass
class Running:
    """A server that runs. log: where its standard error goes."""

    process: subprocess.Popen[bytes]
    bundle: Path
    log: Path
    url: str

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def workers(self) -> list[int]:
        """Processes that it has started and that start no others."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children += [child for path in threads for child in path.read_text().split()]
        found = set()
        for child in children:
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
        return sorted(found)


@contextlib.contextmanager
def running(bundle: Path, state: Path, *arguments: object, port: int = 0) -> Iterator[Running]:
    """A server of a bundle on a free port of this machine, or on a given one; ended at the end."""
    log = state.with_name(f"{state.name}-{time.monotonic_ns()}.log")
    command = [sys.executable, "-W", "ignore", HERE / "served_main.py", "serve", bundle, "--state", state,
               "--port", port, "--workers", 2, *arguments]  # fmt: skip
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as file:
        process = subprocess.Popen([str(part) for part in command], stderr=file, env={**os.environ, "PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            lines = [line for line in log.read_text().splitlines() if '"listening"' in line]
            if lines:
                break
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Running(process, bundle, log, json.loads(lines[0])["url"])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
