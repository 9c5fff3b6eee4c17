"""What it costs to compute a head on a server: time beside one process, bytes on the wire, clients at once, memory.

    python scripts/bench_server.py
    python scripts/bench_server.py --heads 0.1,2.3 --tokens 8 --clients 1,2,4,8

Everything runs on this machine: a server process with its workers, reached over loopback, and clients as threads of
this process, each with keys of its own. "In one process" is the same circuit with the same keys, called here; texts
alternate between both. Bytes are those of TCP's payload, headers included, counted between client and server while
nothing is timed. Memory is the proportional set size.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

import fhe
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module, parse_modules, read_configs
from jaxgpt2.progress import note, step
from jaxgpt2.serving.client import RemoteGPT2
from jaxgpt2.serving.limits import Limits
from jaxgpt2.serving.models import write_bundles
from machine import environment, table
from weights.checkpoint import TINY

PACKAGES = ("jax", "numpy", "concrete-python", "uvicorn", "fastapi", "httpx2")


@dataclasses.dataclass
class Server:
    """A server that runs."""

    pid: int
    url: str

    def memory(self) -> tuple[int, int]:
        """Bytes of the server itself, and of the processes that it has started."""
        return resident(self.pid), sum(map(resident, descendants(self.pid)))


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]  # fmt: skip
    return [*children, *(other for child in children for other in descendants(child))]


def resident(pid: int) -> int:
    """A process's proportional set size, in bytes."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def serving(bundle: Path, state: Path, *arguments: object) -> Iterator[Server]:
    """A server of a bundle on a free port of this machine, ended at the end."""
    command = [sys.executable, "-W", "ignore", "-m", "jaxgpt2.cli", "serve", bundle, "--state", state, "--port", 0]
    log = state.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen([str(part) for part in (*command, *arguments)], stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (lines := [line for line in log.read_text().splitlines() if '"listening"' in line]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"the server does not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield Server(process.pid, json.loads(lines[0])["url"])
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Tap:
    """A port of this machine that passes all bytes on to a server, and counts them."""

    def __init__(self, url: str):
        target = urlsplit(url)
        self.target = target.hostname or "", target.port or 0
        self.sent = self.received = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self.target)
                for source, sink, upwards in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass_on, args=(source, sink, upwards), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:  # before it is passed on: whoever has an answer finds it counted
                    if upwards:
                        self.sent += len(data)
                    else:
                        self.received += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def crossed(self, action: Callable[[], object]) -> tuple[int, int]:
        """Bytes to the server and from it while something was done."""
        before = self.sent, self.received
        action()
        return self.sent - before[0], self.received - before[1]

    def close(self) -> None:
        self._listener.close()


def compiled(heads: str, prompt: str, tokens: int, directory: Path) -> EncryptedGPT2:
    """Heads of the bundled model with their configs, for a prompt and so many new tokens; bundles in a directory."""
    gpt2 = GPT2.from_pretrained("tiny")
    known = read_configs(TINY / "configs.json", gpt2.config)
    modules = parse_modules(heads, gpt2.config)
    missing = [str(module) for module in modules if module not in known]
    if missing:
        raise click.BadParameter(f"there is no config for {', '.join(missing)}", param_hint="--heads")
    passages = bundled_passages("calibration")
    length = len(gpt2.encode(prompt, room=tokens)) + tokens - 1
    encrypted = EncryptedGPT2(gpt2, {module: known[module] for module in modules}).calibrate(passages, length)
    encrypted = encrypted.compile(passages, length)
    write_bundles(encrypted, directory, {"seq_len": length})
    # The server's circuits, as the server loads them: keys of its clients fit them.
    circuits = {
        module: fhe.get_backend(circuit.report.backend).load(directory / "server" / "circuits" / str(module))
        for module, circuit in encrypted.circuits.items()
    }
    return dataclasses.replace(encrypted, circuits=circuits)


def times(tokens: Iterable[int]) -> tuple[list[int], list[float]]:
    """Tokens, and the seconds that each of them took."""
    text, seconds, started = [], [], time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        text.append(token)
        seconds.append(now - started)
        started = now
    return text, seconds


def at_once(clients: list[RemoteGPT2], prompt: str, tokens: int) -> float:
    """Seconds until all clients have their text, each read and continued at the same time."""
    ready = threading.Barrier(len(clients) + 1)

    def one(client: RemoteGPT2) -> None:
        ready.wait()
        list(client.generate(prompt, tokens))

    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        texts = [pool.submit(one, client) for client in clients]
        ready.wait()
        started = time.perf_counter()
        for text in texts:
            text.result()
        return time.perf_counter() - started


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 10e6 else f"{count / 1e6:,.0f} MB"


def numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        found = sorted({int(part) for part in value.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise click.BadParameter("wanted whole numbers with commas between, as 1,2,4")
    return found


@click.command(help=__doc__)
@click.option("--heads", default="0.1", show_default=True, help="Of the bundled model, as 0.1,2.3.")
@click.option("--prompt", default="Privacy is", show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=6, show_default=True, help="New tokens of every text.")
@click.option("--texts", type=click.IntRange(1), default=3, show_default=True, help="Texts that times are medians of.")
@click.option("--clients", default="1,2,4", show_default=True, callback=numbers, help="How many at once.")
@click.option("--workers", type=click.IntRange(1), help="Of the server.  [default: one per core]")
@click.option("--threads", type=click.IntRange(1), help="Of each worker.  [default: all cores]")
@click.option("--keys-in-memory", type=click.IntRange(1), default=Limits().keys_in_memory, show_default=True,
              help="Sets of keys that a worker holds ready.")  # fmt: skip
def main(heads: str, prompt: str, tokens: int, texts: int, clients: list[int], workers: int | None,
         threads: int | None, keys_in_memory: int) -> None:  # fmt: skip
    # Without tokens all clients are one, and share its limits.
    together = max(16, 2 * max(clients) * (heads.count(",") + 1))
    arguments: list[object] = ["--keys-in-memory", keys_in_memory]
    for limit in ("keys-per-client", "sessions-per-client", "requests-per-client"):
        arguments += [f"--{limit}", together]
    arguments += [] if workers is None else ["--workers", workers]
    arguments += [] if threads is None else ["--threads", threads]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with step("calibrating, compiling, writing bundles"):
            encrypted = compiled(heads, prompt, tokens, directory / "compiled")
        server = stack.enter_context(serving(directory / "compiled" / "server", directory / "state", *arguments))

        def connect(url: str, number: int) -> RemoteGPT2:
            bundle, keys = directory / "compiled" / "client", directory / f"keys{number}"
            return stack.enter_context(RemoteGPT2.connect(url, bundle, keys))

        nobody = server.memory()
        # Bytes; and the server has the keys loaded and all is compiled in JAX, before anything is timed.
        tap = Tap(server.url)
        stack.callback(tap.close)
        with step("making keys, counting bytes"):
            remote = connect(tap.url, 0)
            key_bytes = tap.crossed(remote.upload_keys)
            text = remote.generate(prompt, tokens)
            bytes_of = [tap.crossed(lambda: next(text, None)) for _ in range(tokens)]
            list(text)  # is at its end, and closes its session
        own = encrypted.make_keys(directory / "keys0")
        list(encrypted.generate(prompt, 1, "encrypted", keys=own))

        remote = connect(server.url, 0)
        here, there = [], []
        for number in range(texts):
            with step(f"text {number + 1} of {texts}"):
                expected, seconds = times(encrypted.generate(prompt, tokens, "encrypted", keys=own))
                here.append(seconds)
                got, seconds = times(remote.generate(prompt, tokens))
                there.append(seconds)
            if len(got) < tokens or len(expected) < tokens:
                raise click.ClickException(f"the text ends after {min(len(got), len(expected))} tokens: give fewer")
            if got != expected:
                note("the texts differ: lookups go wrong now and then, see --p-error of jaxgpt2 compile")
        length = encrypted.seq_len or 0
        click.echo(f"{environment(*PACKAGES)}\n")
        click.echo(describe(encrypted, prompt, tokens, texts) + "\n")
        click.echo(token_table(here, there, bytes_of, length - tokens + 1) + "\n")
        evaluation = remote.evaluation_key_bytes
        click.echo(
            f"Evaluation keys: {megabytes(evaluation)}; {megabytes(key_bytes[0])} sent for them and "
            f"{key_bytes[1]:,} bytes received, once.\n"
        )

        rows: list[tuple[str, ...]] = [("0", "", "", *map(megabytes, nobody), "")]
        others = [remote]
        for count in clients:
            with step(f"{count} at once"):
                while len(others) < count:
                    others.append(connect(server.url, len(others)))
                    others[-1].upload_keys()
                at_once(others[:count], prompt, 1)  # so that keys are loaded
                took = at_once(others[:count], prompt, tokens)
            of_server, of_workers = server.memory()
            rows.append(
                (str(count), f"{60 * count * tokens / took:.1f}", f"{took / tokens:.2f}", megabytes(of_server),
                 megabytes(of_workers), megabytes((of_server + of_workers - sum(nobody)) / count))
            )  # fmt: skip
        header = ("clients at once", "tokens per minute, all", "seconds per token of each", "server", "workers",
                  "more, per client")  # fmt: skip
        click.echo(table(header, rows))
        click.echo(
            f"\n{workers or os.cpu_count()} workers, each with {threads or 'all'} cores and room for {keys_in_memory} "
            f"sets of keys; texts of {length - tokens + 1} prompt tokens and {tokens} new ones; memory after them."
        )


def describe(encrypted: EncryptedGPT2, prompt: str, tokens: int, texts: int) -> str:
    def one(module: Module) -> str:
        config = encrypted.configs[module]
        return f"{module} ({config.method}, {', '.join(f'{name} {value}' for name, value in config.options.items())})"

    return (
        f"Head {', '.join(map(one, encrypted.modules))} of tiny, {prompt!r} and {tokens} new tokens; medians of "
        f"{texts} texts a side, alternating; server and client on one machine."
    )


def token_table(here: list[list[float]], there: list[list[float]], crossed: list[tuple[int, int]], prompt: int) -> str:
    """Times and bytes of each token."""
    rows = []
    columns = zip(zip(*here, strict=True), zip(*there, strict=True), crossed, strict=True)
    for number, (own, others, (sent, received)) in enumerate(columns):
        name = f"first ({prompt} tokens read)" if number == 0 else f"{number + 1}. ({prompt + number - 1} in the cache)"
        rows.append(timed(name, statistics.median(own), statistics.median(others), sent, received))
    totals = [statistics.median(map(sum, side)) for side in (here, there)]
    rows.append(timed("all", *totals, *(sum(part) for part in zip(*crossed, strict=True))))
    return table(("new token", "in one process", "through the server", "ratio", "sent", "received"), rows)


def timed(name: str, own: float, other: float, sent: float, received: float) -> tuple[str, ...]:
    return name, f"{own:.2f} s", f"{other:.2f} s", f"{other / own:.2f}", megabytes(sent), megabytes(received)


if __name__ == "__main__":
    main()
