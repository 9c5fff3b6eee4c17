"""Ctrl-C: every command that computes ends with 130, whatever it is doing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxgpt2.cli import supervise
from jaxgpt2.cli.app import SUPERVISED

# As a command: it says that it has begun, leaves a file, and then does something.
SCRIPT = """
import os, pathlib, signal, subprocess, sys, tempfile, time
from jaxgpt2.cli import supervise

supervise.GRACE = {grace}

def command():
    where = pathlib.Path(tempfile.mkdtemp())
    print(where, flush=True)
    {what}

sys.exit(supervise.supervised(command))
"""
DEAF = """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
"""
POLITE = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("going", flush=True)
        sys.exit(130)
"""


@contextlib.contextmanager
def command(what: str, grace: float = 60) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A supervised command that has begun, and its temporary directory. grace: seconds that it has to end by itself."""
    script = textwrap.dedent(SCRIPT).format(what=what.strip(), grace=grace)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def wait_for_the_end(child: int) -> None:
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(child, 0)
            time.sleep(0.01)


def test_a_command_that_hears_nothing_is_ended():
    with command(DEAF, 0.2) as (process, temporary):
        assert process.stdout is not None and temporary.exists()
        child = int(process.stdout.readline())
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130 and errors == "jaxgpt2: stopped\n"
        assert time.monotonic() - started < 30
        wait_for_the_end(child)
    assert not temporary.exists()


def test_a_command_that_ends_by_itself_is_let():
    with command(POLITE) as (process, temporary):
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        assert (process.returncode, output, errors) == (130, "going\n", "")
    assert not temporary.exists()


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("sys.exit(2)", 2, ""),
        ("pass", 0, ""),
        ("signal.raise_signal(signal.SIGKILL)", 137, "jaxgpt2: it was killed: is there too little memory?\n"),
    ],
)
def test_its_exit_status_is_the_commands(what, status, said):
    with command(what) as (process, temporary):
        _, errors = process.communicate()
        assert (process.returncode, errors) == (status, said)
    assert not temporary.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_command_outlives_who_waits_for_it(number):
    with command("print(os.getpid(), flush=True); time.sleep(60)") as (process, _):
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -number)
        wait_for_the_end(child)


def test_commands_that_compute_are_supervised():
    assert {"compile", "eval", "generate", "prepare", "sweep", "tune"} == set(SUPERVISED)
    assert supervise.GRACE <= 2
