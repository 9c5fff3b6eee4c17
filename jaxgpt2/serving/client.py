"""The model of a client, whose encrypted modules a server computes.

from jaxgpt2.serving import RemoteGPT2

with RemoteGPT2.connect("https://heads.example.org:8343", "client/", token=token) as model:
    for new in model.generate("Privacy is", 8):
        print(model.text([new]), end="", flush=True)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import fhe
from jaxgpt2.encrypted import EncryptedGPT2, get_backend
from jaxgpt2.errors import InputError
from jaxgpt2.generation import Sampling
from jaxgpt2.modules import Module
from jaxgpt2.serving.bundle import Bundle
from jaxgpt2.serving.models import read_client
from jaxgpt2.serving.remote import Connection, Remote


class NotEncrypted(InputError):
    """A client bundle of a backend that encrypts nothing: the server would read the text."""


class RemoteGPT2:
    """A GPT-2 whose encrypted modules are computed by a server, which sees neither text nor keys. Use it in a `with`.

    Args:
        encrypted: of a client bundle.
        connection: to a server that has been asked what it serves (`Connection.check`).
        keys: of every encrypted module; they stay here.
    """

    def __init__(self, encrypted: EncryptedGPT2, connection: Connection, keys: Mapping[Module, fhe.Keys]):
        self.encrypted, self.connection, self.keys = encrypted, connection, keys

    @classmethod
    def connect(
        cls,
        url: str,
        client: str | os.PathLike[str],
        keys: Path | None = None,
        send_my_text_unencrypted: bool = False,
        **options: Any,
    ) -> Self:
        """A model from a client bundle, and a server that has the server bundle of the same compilation.

        Keys are made if there are none, which takes seconds to minutes.

        Args:
            url: the server's, as `https://host:8343`.
            client: directory of the client bundle.
            keys: directory of secret keys, by default in the user's data directory; it must be its owner's alone.
            send_my_text_unencrypted: use bundles of the backend `clear` too, which encrypts nothing: for tests.
            options: of `Connection`, such as `token`.

        Raises:
            BundleError: the directory is no client bundle; NotEncrypted: its backend encrypts nothing; ServerError: the
                server does not answer or belongs to another bundle.
        """
        connection = Connection(url, **options)
        try:
            return cls.open(Bundle.read(Path(client), "client"), connection, keys, send_my_text_unencrypted)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(
        cls, bundle: Bundle, connection: Connection, keys: Path | None = None, send_my_text_unencrypted: bool = False
    ) -> Self:
        """`connect`, with a bundle and a connection that are there already."""
        for entry in bundle.circuits:
            if "encrypted" not in get_backend(entry.backend).offers and not send_my_text_unencrypted:
                raise NotEncrypted(
                    f"module {entry.module} was compiled with the backend {entry.backend!r}, which encrypts nothing: "
                    "the server would read your text; have it compiled with another (for tests, "
                    "--send-my-text-unencrypted allows it)"
                )
        connection.check(bundle.id, [entry.id for entry in bundle.circuits])
        encrypted = read_client(bundle)
        return cls(encrypted, connection, encrypted.make_keys(keys or key_directory()))

    @property
    def evaluation_key_bytes(self) -> int:
        """Of all encrypted modules together."""
        return sum(len(keys.evaluation) for keys in self.keys.values())

    def upload_keys(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Sends the evaluation keys that the server lacks, from where an upload broke off.

        Args:
            progress: is told how many bytes more the server has.

        Raises:
            ServerError: the server refuses them, or is gone.
        """
        for keys in self.keys.values():
            self.connection.upload(keys.evaluation, progress)

    def generate(self, prompt: str, max_new_tokens: int = 8, sampling: Sampling | None = None) -> Iterator[int]:
        """Yields the tokens that continue a prompt. Evaluation keys that the server lacks are sent before the first.

        Raises:
            NotReady: the text would be longer than the circuits; ServerError: the server refuses, or is gone;
            fhe.FHEError: decrypted numbers that cannot be right.
        """
        executors = {
            m: Remote(self.connection, circuit, self.keys[m]) for m, circuit in self.encrypted.circuits.items()
        }
        tokens = self.encrypted.continue_text(prompt, max_new_tokens, self.encrypted.run_by(executors), sampling)

        def until_closed() -> Iterator[int]:
            try:
                yield from tokens
            finally:
                for executor in executors.values():
                    executor.close()

        return until_closed()

    def text(self, tokens: list[int]) -> str:
        return self.encrypted.model.text(tokens)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def key_directory() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("jaxgpt2")) / "keys"
