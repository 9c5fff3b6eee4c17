"""The commands of two machines: `serve` and `token` for the one with the weights, `generate --server` for the other."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jaxgpt2.cli import linear
from jaxgpt2.cli.options import Directory, File, check_writable, connect, options
from jaxgpt2.cli.text import write_tokens
from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.progress import megabytes, note, sending, step
from jaxgpt2.serving.limits import Limits


def _limit(name: str, help: str, unit: float = 1, **kwargs: Any) -> Callable[[Any], Any]:
    """An option for a field of `Limits`, in a unit of so many bytes; the default is the field's."""
    default = getattr(Limits(), name)
    kwargs.setdefault("type", click.IntRange(1))
    return click.option(
        f"--{name.replace('_', '-')}", default=None if default is None else int(default / unit), help=help,
        show_default=default is not None, **kwargs,
    )  # fmt: skip


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8343, show_default=True, help="0 takes a free one.")
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Clients' names and the SHA-256 of their tokens; see the command token.",
)
@click.option("--anybody", is_flag=True, help="Serve whoever can reach the server, on any address, without tokens.")
@click.option("--tls-cert", "certificate", type=click.Path(path_type=Path), metavar="FILE", help="Certificate (chain).")
@click.option("--tls-key", "key", type=click.Path(path_type=Path), metavar="FILE", help="Its private key.")
@click.option(
    "--tls-client-ca",
    "client_authority",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Clients must have a certificate of this authority.",
)
@click.option(
    "--state",
    type=Directory(),
    metavar="DIR",
    help="Evaluation keys and sessions are kept here.  [default: the user's state directory]",
)
@click.option("--workers", type=click.IntRange(0), help="Worker processes.  [default: one per core]")
@click.option("--threads", type=click.IntRange(1), help="Threads of each worker.  [default: one per core]")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler, whose workers compute too; they need the bundle and --state under the same paths.",
)
@click.option(
    "--attention",
    "methods",
    multiple=True,
    metavar="FILE.py:NAME",
    help="The file of an attention method that the bundle was compiled with, if its server computes with it (backend "
    "clear): workers run the file. May be repeated.",
)
@click.option(
    "--array",
    type=click.Choice(["numpy", "jax"]),
    default="numpy",
    show_default=True,
    help="Library that multiplies encrypted masks by linear layers; jax uses its default device.",
)
@options(
    _limit("body", "Largest request, in megabytes.", 1e6),
    _limit("keys", "Megabytes of evaluation keys on disk; those used longest ago go first.", 1e6),
    _limit("keys_per_client", "Sets of keys that a client may have here at once."),
    _limit("keys_in_memory", "Sets of keys that each worker holds ready."),
    _limit("sessions", "Sessions open at once."),
    _limit("sessions_per_client", "Sessions of a client open at once."),
    _limit("session_size", "Largest session, in megabytes of ciphertexts.", 1e6),
    _limit("idle", "Seconds after which an unused session is closed."),
    _limit("queue", "Batches that may wait for a worker."),
    _limit("requests", "Requests in flight at once."),
    _limit("requests_per_client", "Requests of a client in flight at once."),
    _limit("calls_per_minute", "Functions that a client may run in a minute.  [default: no limit]"),
    _limit("job", "Seconds that a batch may take to compute."),
    _limit("grace", "Seconds that running requests get when the server stops."),
)
def serve(directory: Path, host: str, port: int, tokens: Path | None, anybody: bool, certificate: Path | None,
          key: Path | None, client_authority: Path | None, state: Path | None, workers: int | None,
          threads: int | None, scheduler: str | None, methods: tuple[str, ...], array: str,
          **limits: Any) -> None:  # fmt: skip
    """Compute for clients what the server bundle in DIR holds."""
    try:
        from jaxgpt2.serving import server
        from jaxgpt2.serving.address import listen_on
        from jaxgpt2.serving.bundle import Bundle
    except ImportError as error:
        raise MissingExtra(error, "serve", "server") from None

    bundle = Bundle.read(directory, "server")
    files = bundle.method_files(methods)
    if tokens is None and not anybody and not server.is_loopback(host):
        raise InputError(f"on {host} anybody could use the server: give --tokens FILE, or --anybody if they may")
    if (certificate is None) != (key is None) or (client_authority is not None and certificate is None):
        raise InputError("TLS takes --tls-cert and --tls-key, and --tls-client-ca only with both")
    if workers == 0 and scheduler is None:
        raise InputError("--workers 0 leaves nobody to compute: give more, or a --scheduler")
    if state is None:
        import platformdirs

        state = check_writable(Path(platformdirs.user_state_dir("jaxgpt2")) / bundle.id[:16])
    for name in ("body", "keys", "session_size"):
        limits[name] *= 10**6
    settings = server.ServerSettings(
        state=state,
        tokens=None if tokens is None else server.read_tokens(tokens),
        workers=workers,
        threads=threads,
        scheduler=scheduler,
        files=files,
        certificate=certificate,
        key=key,
        client_authority=client_authority,
        limits=Limits(**limits),
    )
    with listen_on(host, port) as listener:  # before anything is written for a server
        if bundle.is_linear:
            from jaxgpt2.serving.linear_server import serve_linear

            serve_linear(bundle, settings, listener, array)
        else:
            server.serve(bundle, settings, listener)


def generate_remotely(
    prompt: str,
    server: str,
    client: Path,
    keys: Path | None,
    masks: Path | None,
    verify: str | None,
    send_my_text_unencrypted: bool,
    connecting: dict[str, Any],
    max_new_tokens: int,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    """`generate` where a server computes what is encrypted. sampling: what is other than the model's own way."""
    with contextlib.closing(connect(server, **connecting)) as connection:
        from jaxgpt2.serving.bundle import Bundle
        from jaxgpt2.serving.client import RemoteGPT2
        from jaxgpt2.serving.linear_bundle import read_client

        bundle = Bundle.read(client, "client")
        if bundle.is_linear:
            linear.refuse_unused(keys=keys)
            linear.generate_remotely(
                prompt, read_client(bundle), connection, masks, verify, max_new_tokens, sampling, as_json
            )
            return
        if masks is not None or verify is not None:
            raise InputError("--masks and --verify are for client bundles of linear layers: leave them out")
        with step("asking the server, reading the client bundle, making keys if there are none"):
            model = RemoteGPT2.open(bundle, connection, keys, send_my_text_unencrypted)
        traffic = connection.traffic
        with sending("sending evaluation keys", model.evaluation_key_bytes) as progress:
            model.upload_keys(progress)
        result: dict[str, Any] = {
            "prompt": prompt,
            "mode": "server",
            "modules": ",".join(map(str, model.encrypted.modules)),
        }

        def waiting(number: int) -> str:
            crossed = f", {megabytes(traffic.sent)} sent, {megabytes(traffic.received)} received" if number > 1 else ""
            return f"token {number} of {max_new_tokens}{crossed}"

        tokens = model.generate(prompt, max_new_tokens, dataclasses.replace(model.encrypted.model.sampling, **sampling))
        write_tokens(model.encrypted.model, result, tokens, as_json, waiting, lambda: dataclasses.asdict(traffic))
        note(
            f"{megabytes(traffic.sent)} of ciphertexts sent, {megabytes(traffic.received)} received, in "
            f"{traffic.requests} requests; evaluation keys "
            + (f"sent, {megabytes(traffic.keys)}" if traffic.keys else "were there already")
        )


@click.command()
@click.argument("name")
@click.argument("file", type=File())
def token(name: str, file: Path) -> None:
    """Print a new token for the client NAME, and add its SHA-256 to FILE, which serve --tokens reads.

    The name `metrics` makes a token that may read /metrics and nothing else.
    """
    try:
        from jaxgpt2.serving.server import read_tokens
    except ImportError as error:
        raise MissingExtra(error, "token", "server") from None
    from weights.checkpoint import write_atomically

    secret = secrets.token_urlsafe(32)
    try:
        old = file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError:
        raise InputError(f"{file} is no file of tokens: give another") from None
    line = f"{name} {hashlib.sha256(secret.encode()).hexdigest()}\n"

    def write(path: str) -> None:
        Path(path).write_text(old + ("\n" if old and not old.endswith("\n") else "") + line, encoding="utf-8")
        read_tokens(Path(path))  # so that nothing is written that it would not take

    write_atomically(file, write)
    note(f"added {name} to {file}; the token is shown this once:")
    click.echo(secret)
