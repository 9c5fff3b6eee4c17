"""Ctrl-C for commands that compute in other people's machine code, which may hear of it late, or never."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

# Seconds in which a command ends by itself, before it is killed.
GRACE = 1.5

# What prctl calls the signal for a process whose parent dies.
PR_SET_PDEATHSIG = 1

STOPPED = 130
WATCHED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}


def supervised(command: Callable[[], object], said: str = "stopped") -> int:
    """The exit status of a command that runs in a process of its own: after Ctrl-C it has `GRACE` seconds to end.

    What it writes appears whole or not at all, so it may be killed; its temporary files go too. To be called before
    anything starts threads, as it forks.

    said: for one that was killed; another says it by itself.
    """
    with tempfile.TemporaryDirectory(prefix="jaxgpt2-", ignore_cleanup_errors=True) as temporary:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError, AttributeError):  # Linux only: it ends with whoever waits for it
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.environ["TMPDIR"] = tempfile.tempdir = temporary
            command()
            sys.exit(0)
        return _wait(child, said)


def _wait(child: int, said: str) -> int:
    stopped = False
    while True:
        came = signal.sigwaitinfo(WATCHED) if not stopped else signal.sigtimedwait({signal.SIGCHLD}, GRACE)
        if came is None:
            for process in _family(child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        elif came.si_signo == signal.SIGINT:
            stopped = True
            if came.si_pid:  # from a process, and not from the terminal, which tells both
                os.kill(child, signal.SIGINT)
        elif came.si_signo != signal.SIGCHLD:
            os.kill(child, came.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG if came is not None else 0)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if stopped:
                if code != STOPPED:
                    click.echo(f"jaxgpt2: {said}", err=True)
                return STOPPED
            if code == -signal.SIGKILL:
                click.echo("jaxgpt2: it was killed: is there too little memory?", err=True)
            return code if code >= 0 else 128 - code


def _family(process: int) -> list[int]:
    """A process and all that it has started: those of a pool outlive one that is killed."""
    found = [process]
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [each for child in path.read_text().split() for each in _family(int(child))]
    return found
