"""What a worker process does: a batch of a session, from files to files.

Workers on this machine and on others run this one function. They share the bundle and the server's state directory, so
that keys and ciphertexts are read where they lie and pass through no other process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import fhe
from fhe.envelope import write_whole
from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.protocol import Answer, Batch, Result, pack, unpack


@dataclass(frozen=True)
class Job:
    """A batch, packed as it came, and where to find what it needs.

    circuit: directory of the compiled circuit; keys: file of the evaluation keys; session: directory of results.
    in_memory: sets of keys that a worker holds ready at once. room: bytes by which the session may grow. files: of
    attention methods that the circuit names, as `Bundle.method_files` returns them.
    """

    backend: str
    circuit: Path
    keys: Path
    session: Path
    batch: bytes
    in_memory: int
    room: int
    files: tuple[tuple[str, str, bytes], ...] = ()


@dataclass(frozen=True)
class Done:
    """What became of a job: the seconds each function took, or an error's status, code and detail."""

    seconds: tuple[tuple[str, float], ...] = ()
    error: tuple[int, str, str] | None = None


def start_worker(threads: int | None) -> None:
    """Before a worker's first job. threads: of its runtime; None for as many as there are cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all processes; the server decides
    # What native code prints when it dies would stand between the lines of the server's log.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the runtime when it is loaded, with the first circuit
    with contextlib.suppress(OSError):  # Linux: where memory runs out, a worker goes and not the server
        Path("/proc/self/oom_score_adj").write_text("500")


@functools.cache
def _ready() -> OrderedDict[tuple[Path, Path], tuple[fhe.Circuit, bytes]]:
    """Circuits with the keys that they have loaded: loading takes seconds. The last used ones are at the end."""
    return OrderedDict()


def _load(job: Job) -> fhe.Circuit:
    backend = fhe.get_backend(job.backend)
    try:
        return backend.load(job.circuit)
    except fhe.UnknownName:
        from jaxgpt2.methods import files  # registers the functions of all methods, and takes a while

        for file in job.files:
            files.from_source(*file)
        return backend.load(job.circuit)


def _circuit(job: Job) -> tuple[fhe.Circuit, bytes]:
    ready, name = _ready(), (job.circuit, job.keys)
    if name not in ready:
        try:
            keys = job.keys.read_bytes()
        except FileNotFoundError:
            raise APIError(409, "keys_missing", "these evaluation keys are not here: upload them") from None
        while len(ready) >= job.in_memory:
            ready.popitem(last=False)
        ready[name] = _load(job), keys
    ready.move_to_end(name)
    return ready[name]


def perform(job: Job) -> Done:
    """Runs the calls of a batch, then stores what later calls may take, then the answer."""
    try:
        return Done(seconds=tuple(_perform(job)))
    except APIError as error:
        return Done(error=(error.status, error.code, error.detail))
    except (fhe.FHEError, ValueError) as error:
        return Done(error=(422, "refused", " ".join(str(error).split())[:500]))
    except MemoryError:
        return Done(error=(500, "out_of_memory", "the worker has too little memory for this"))
    except Exception as error:  # the type says what went wrong here; the text might say what with
        return Done(error=(500, "failed", f"the computation failed: {type(error).__name__}"))


def _perform(job: Job) -> list[tuple[str, float]]:
    circuit, keys = _circuit(job)
    batch = unpack(Batch, job.batch)
    kept, forgotten = circuit.signatures.server_state, set(batch.forget)
    fresh: dict[Result, bytes] = {}
    stored: dict[Result, bytes] = {}
    shown: dict[Result, bytes] = {}  # the client's: nothing else can get into an answer, whatever is asked for
    wanted, size = Counter(batch.results), 0
    seconds = []

    def take(source: int | Result) -> bytes:
        if isinstance(source, int):
            return batch.uploads[source]
        if source not in fresh:
            fresh[source] = (job.session / f"{source.call}.{source.output}").read_bytes()
        return fresh[source]

    for call in batch.calls:
        started = time.perf_counter()
        results = circuit.run(call.function, [take(source) for source in call.inputs], keys)
        seconds.append((call.function, time.perf_counter() - started))
        for output, data in enumerate(results):
            result = Result(call=call.id, output=output)
            fresh[result] = data
            size += wanted[result] * len(data)
            if fhe.Output(call.function, output) not in kept:
                shown[result] = data
            elif result not in forgotten:
                stored[result] = data
                size += len(data)
        if size > job.room:
            raise APIError(413, "session_full", "the session would hold more bytes than this server allows")
    for result, data in stored.items():
        write_whole(job.session / f"{result.call}.{result.output}", data, durable=False)
    try:
        answer = Answer(results=[shown[result] for result in batch.results])
    except KeyError:
        raise APIError(403, "kept", "a result that was asked for stays on the server") from None
    write_whole(job.session / f"answer.{batch.request}", pack(answer), durable=False)
    return seconds
