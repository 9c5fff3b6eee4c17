"""A small model whose linear layers a server computes: its bundles, its masks, honest and hostile servers of it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from safetensors.numpy import save_file

from fhe import rlwe
from jaxgpt2.generation import Sampling
from jaxgpt2.linear import LinearClient, LinearGPT2, Products
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.serving import bundle as bundles
from jaxgpt2.serving.bundle import FORMAT
from jaxgpt2.serving.linear_bundle import shapes_of
from jaxgpt2.serving.masked import LocalOwner, alone, prepare, store_for
from jaxgpt2.serving.masks import MaskStore

PASSAGES = ["the cat sat on a mat", "one dog ran after two", "it was not the", "zebras and xylem", "quick brown fox"]
PROMPT = "a cat"


def calibration_file(directory: Path) -> Path:
    path = directory / "passages.txt"
    path.write_text("\n".join(PASSAGES) + "\n")
    return path


def prepared_store(model: LinearGPT2, directory: Path) -> MaskStore:
    """A store with one batch of masks."""
    store = store_for(model.client, directory / "masks", directory / "ledgers")
    prepare(model.client, store, alone(LocalOwner(model.weights)), 1, lambda tokens: None)
    return store


def opened_store(client: LinearClient, home: Path) -> MaskStore:
    """The store that the commands use, where HOME/state is the user's directory of state."""
    return store_for(client, home / "masks", home / "state" / "jaxgpt2" / "masks")


def quantized_tokens(model: LinearGPT2, prompt: str, count: int, sampling: Sampling | None = None) -> list[int]:
    return list(model.client.generate(prompt, count, model.products(), sampling, keep_count=False))


def recorded(products: Products, into: list[tuple[str, np.ndarray]]) -> Products:
    """Products that are noted, without padding."""

    def multiply(name: str, x: jax.Array, count: int) -> ArrayLike:
        y = products(name, x, count)
        into.append((name, np.asarray(y)[:, :count]))
        return y

    return multiply


def random_matrices(directory: Path, width: int = 32) -> Path:
    """A server's bundle of random matrices: of inputs and outputs it has (width, 3 width), (width, width) and so on."""
    config = GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=8, vocab_size=8, eos_token_id=None)
    random = np.random.default_rng(0)
    weights = {name: random.integers(-127, 128, shape, np.int16) for name, shape in shapes_of(config).items()}
    directory.mkdir()
    save_file(weights, directory / "weights.safetensors")
    bundles.write(directory, "server", "c" * 64, {}, {"linear": {"config": dataclasses.asdict(config)}})
    return directory


# --- servers in a thread --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    headers: str = ""


# What a server says to a request: status, headers, body; None hangs up.
Said = tuple[int, Mapping[str, Any], bytes] | None


@contextlib.contextmanager
def serving(say: Callable[[Request], Said]) -> Iterator[str]:
    """A server that says what it is told to say; yields its URL. A body is sent as it is, with its size in front unless
    the headers say something of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = say(Request(self.command, self.path, body, str(self.headers)))
            if said is None:
                self.close_connection = True
                return
            status, headers, content = said
            self.send_response(status)
            sizes = {} if {"Content-Length", "Transfer-Encoding"} & headers.keys() else {"Content-Length": len(content)}
            for name, value in {**headers, **sizes}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a client that hangs up is what some tests want
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def specification(client: LinearClient) -> dict[str, Any]:
    shapes = {name: list(shape) for name, shape in client.shapes.items()}
    return {"format": FORMAT, "bundle": client.identity, "version": "0", "linear": shapes}


@dataclass
class Owner:
    """A model's server, which may change what it answers, and what it was asked.

    change: takes the phase, the matrix's name and the right answer; gives what is answered.
    """

    model: LinearGPT2
    change: Callable[[str, str, bytes], Said | bytes] = lambda phase, name, answer: answer
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = list(self.model.client.shapes)
        self._owner = LocalOwner(self.model.weights)

    def __call__(self, request: Request) -> Said:
        if request.path == "/specification":
            return 200, {"Content-Type": "application/json"}, json.dumps(specification(self.model.client)).encode()
        self.requests.append(request)
        _, _, number, phase = request.path.split("/")
        name = self._names[int(number)]
        if phase == "online":
            masked = np.frombuffer(request.body, "<u4").reshape(-1, self.model.client.shapes[name][0])
            answer = self._owner.online(name, masked.astype(np.uint32)).tobytes()
        else:
            answer = self._owner.ahead(name, [request.body], len(request.body))
        changed = self.change(phase, name, answer)
        return (200, {}, changed) if isinstance(changed, bytes) else changed


def one_number_wrong(phase: str, change: Callable[[np.ndarray], None]) -> Callable[[str, str, bytes], bytes]:
    """A change of answers of one phase: `change` gets the residues or products of the model's first matrix."""

    def changed(which: str, name: str, answer: bytes) -> bytes:
        if which != phase or name != "h.0.attn.c_attn":
            return answer
        if phase == "online":
            products = np.frombuffer(answer, "<u4").copy()
            change(products)
            return products.tobytes()
        parameters = rlwe.Parameters()
        outputs = len(answer) // parameters.output_bytes
        residues = rlwe.unpack_answer(answer, outputs, parameters)
        change(residues)
        return rlwe.pack_answer(residues % np.uint64(parameters.coeff_modulus), parameters)

    return changed


@contextlib.contextmanager
def delayed(port: int, seconds: float) -> Iterator[str]:
    """A way to a port of this machine on which every byte takes so long, in either direction; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = [listener]

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(seconds)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                sockets.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
