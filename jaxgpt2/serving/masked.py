"""Products of matrices that somebody else holds, with inputs that they never see: the client's side (`fhe.rlwe`).

*Ahead*, `prepare` has masks multiplied under encryption and keeps the products in a `MaskStore`. *Online*, `Masked`
adds a mask to what it sends and takes the mask's product off what comes back. Nothing that is sent depends on a
check that used a secret key, and a wrong answer does not stop a text: it is told when the text is done.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

import weights
from fhe import rlwe
from jaxgpt2.errors import InputError
from jaxgpt2.executors.processes import ProcessDied
from jaxgpt2.linear import LinearClient
from jaxgpt2.methods import linear
from jaxgpt2.models.gpt2.pretrained import load_checkpoint
from jaxgpt2.serving.masks import Claimed, MaskStore


class WrongProducts(InputError):
    """A server that answered with something else than the products of the verified matrices."""


class MatrixOwner(Protocol):
    """Who holds the matrices: in this process, or behind HTTP."""

    def ahead(self, name: str, request: Iterable[bytes], size: int) -> bytes:
        """The answer to an encrypted request of `size` bytes for a matrix, by its full name."""
        ...

    def online(self, name: str, masked: np.ndarray) -> np.ndarray:
        """Masked numbers uint32 (T, d) times the matrix modulo 2**32: uint32 (T, m)."""
        ...


class LocalOwner:
    """Matrices in this process. array: whose arrays compute ahead, "numpy" or "jax"."""

    def __init__(self, matrices: Mapping[str, np.ndarray], array: str = "numpy"):
        parameters = rlwe.Parameters()
        kind = "jax" if array == "jax" else "numpy"
        self.matrices = {name: rlwe.Matrix(weight, parameters, kind) for name, weight in matrices.items()}

    def ahead(self, name: str, request: Iterable[bytes], size: int) -> bytes:
        return b"".join(self.matrices[name].answer(b"".join(request)))

    def online(self, name: str, masked: np.ndarray) -> np.ndarray:
        return self.matrices[name].online(masked)


def store_for(client: LinearClient, directory: Path, ledgers: Path) -> MaskStore:
    """The store of a model's masks in a directory. Raises MaskError."""
    outputs = {name: outputs for name, (_, outputs) in client.shapes.items()}
    return MaskStore(directory, client.identity, outputs, ledgers)


class Piece(NamedTuple):
    """One matrix's products with one batch's masks, to be made. number: the matrix's; size: (d, m)."""

    name: str
    number: int
    size: tuple[int, int]
    seeds: Sequence[bytes]


def make_products(owner: MatrixOwner, piece: Piece) -> np.ndarray:
    """A piece's products (m, N), under a key that nothing else is encrypted with."""
    parameters = rlwe.Parameters()
    inputs, outputs = piece.size
    masks = rlwe.masks(piece.seeds, piece.number, inputs)
    with rlwe.ClientBatch(parameters) as keys:
        answer = owner.ahead(piece.name, keys.encrypt_blocks(masks), inputs * parameters.feature_bytes)
        return keys.decrypt(answer, outputs)


# Makes pieces' products, in their order.
Makes = Callable[[Iterable[Piece]], Iterable[np.ndarray]]

_owner: MatrixOwner | None = None


def _start(connect: Callable[[], MatrixOwner]) -> None:
    global _owner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started them decides
    _owner = connect()


def _make(piece: Piece) -> np.ndarray:
    assert _owner is not None
    return make_products(_owner, piece)


@contextlib.contextmanager
def in_processes(connect: Callable[[], MatrixOwner], count: int) -> Iterator[Makes]:
    """Pieces in so many processes of this machine: SEAL uses one core, and the owner takes its time.

    connect: picklable, for every process.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(count, context, initializer=_start, initargs=(connect,)) as pool:

        def make(pieces: Iterable[Piece]) -> Iterator[np.ndarray]:
            waiting = collections.deque(pool.submit(_make, piece) for piece in pieces)
            while waiting:
                yield waiting.popleft().result()

        try:
            yield make
        except BaseException as error:
            # A piece may wait for its server for long, and nobody wants it any more. Nothing is cancelled, as Python
            # 3.11's pool trips over what is cancelled when its processes end.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ProcessDied("a process that made masks died: is there too little memory?") from None
            raise


def prepare(
    client: LinearClient, store: MaskStore, make: Makes, tokens: int, progress: Callable[[float], None]
) -> None:
    """Makes masks until there are at least so many; goes on where it was interrupted. One process at a time may do so.

    progress: is told how many tokens more are done, in parts of a token.

    Raises:
        MaskError: the disk is full, or another process makes masks there; what the owner raises.
    """
    if store.left() >= tokens:
        return
    with store.preparing():
        _prepare(client, store, make, tokens, progress)


def _prepare(
    client: LinearClient, store: MaskStore, make: Makes, tokens: int, progress: Callable[[float], None]
) -> None:
    shapes = client.shapes
    work = {name: inputs + outputs for name, (inputs, outputs) in shapes.items()}
    total, size = sum(work.values()), rlwe.Parameters().poly_modulus_degree
    while store.left() < tokens:
        batch = store.pending()
        pieces = [Piece(name, number, shapes[name], batch.seeds) for number, name in enumerate(shapes)]
        progress(size * sum(work[piece.name] for piece in pieces[: batch.done]) / total)
        missing = pieces[batch.done :]
        for piece, products in zip(missing, make(missing), strict=True):
            batch = store.add(batch, piece.name, products)
            progress(size * work[piece.name] / total)


def alone(owner: MatrixOwner) -> Makes:
    """Pieces in this process, one after the other."""
    return lambda pieces: (make_products(owner, piece) for piece in pieces)


class Masked:
    """`jaxgpt2.linear.Products` by a matrix owner that sees masked numbers only.

    Args:
        claimed: masks for all tokens that will be read, in order.
        verifiers: of every matrix, where the weights are public; None checks nothing.
    """

    def __init__(
        self,
        client: LinearClient,
        owner: MatrixOwner,
        claimed: Claimed,
        verifiers: Mapping[str, rlwe.Verifier] | None = None,
    ):
        self._owner, self._claimed, self._verifiers = owner, claimed, verifiers
        self._numbers = {name: number for number, name in enumerate(client.shapes)}
        self._used = dict.fromkeys(client.shapes, 0)
        self.wrong: set[str] = set()

    def __call__(self, name: str, x: jax.Array, count: int) -> np.ndarray:
        integers = np.asarray(x)[0, :count]  # (T, d)
        start = self._used[name]
        rows = slice(start, start + count)
        self._used[name] += count  # before anything is sent, and never taken back
        seeds = self._claimed.seeds[rows]
        if len(seeds) < count:
            raise InputError(
                f"masks for {start + count} tokens are needed, and {len(self._claimed.seeds)} were claimed"
            )
        mask = rlwe.masks(seeds, self._numbers[name], integers.shape[1]).T
        products = self._owner.online(name, integers.view(np.uint32) + mask)
        y = (products - self._claimed.products[name][rows]).view(np.int32)
        if self._verifiers is not None and not self._verifiers[name].check(integers, y):
            self.wrong.add(name)
        padded = np.zeros((1, x.shape[1], y.shape[1]), np.int32)
        padded[0, :count] = y
        return padded

    def check(self) -> None:
        """What was found wrong, when the text is done.

        Raises:
            WrongProducts: the server's products were wrong.
        """
        if self.wrong:
            raise WrongProducts(
                f"the server's products of {len(self.wrong)} matrices are not those of the verified weights, "
                f"{min(self.wrong)} among them: the text is wrong; do not use this server"
            )


def verifiers_of(client: LinearClient, name: str) -> dict[str, rlwe.Verifier]:
    """Checks of every matrix, from a public checkpoint: its weights are quantized as the server's were, one by one.

    Raises:
        weights.CheckpointError, InputError: there is no such checkpoint, or it is of another shape.
    """
    directory = weights.locate(name)
    config, tensors = load_checkpoint(directory)
    if config != client.config:
        raise InputError(f"{name} has another configuration than the client bundle: --verify wants its checkpoint")
    found = {}
    for layer, params in enumerate(client.params.layers):
        for own, vectors in params.items():
            weight, _ = linear.folded(tensors, layer, own)
            integers, scale = linear.quantize_matrix(
                vectors.smoothing.astype(np.float64)[:, None] * weight, client.bits.weights
            )
            if not np.array_equal(scale.astype(np.float32), vectors.scale):
                raise InputError(f"{name} has other weights than the client bundle: --verify wants its checkpoint")
            found[f"h.{layer}.{own}"] = rlwe.Verifier([integers], integers.shape[1])
    return found


def masked_text(tokens: Iterator[int], masked: Masked) -> Iterator[int]:
    """Tokens of a text, and then what was found wrong."""
    yield from tokens
    masked.check()
