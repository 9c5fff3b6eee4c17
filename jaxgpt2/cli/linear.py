"""What commands do where `--encrypt linear` says that every linear layer is somebody else's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.cli.options import Directory, calibration_passages, connect, connection_options, emit, options
from jaxgpt2.cli.text import write_tokens
from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.progress import counting, megabytes, note, seconds, step

if TYPE_CHECKING:
    from jaxgpt2.linear import LinearClient, LinearGPT2
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.serving.masked import Makes
    from jaxgpt2.serving.masks import MaskStore
    from jaxgpt2.serving.remote import Connection, RemoteOwner

LINEAR = "linear"

# What masks take ahead, client and server on one machine: scripts/bench_linear.py measures it.
SECONDS_A_STORED_BYTE = 1.5e-7
MACHINE = "2 cores of AMD EPYC"


def refuse_unused(**given: Any) -> None:
    """Raises InputError for an option that was given and says nothing of linear layers."""
    for name, value in given.items():
        if value is not None and value != ():
            raise InputError(f"--{name.replace('_', '-')} has no place beside --encrypt linear: leave it out")


def require_extra() -> None:
    """Refuses to begin what needs encryption where it is not installed.

    Raises:
        MissingExtra: a library that masks are made with is not there.
    """
    for name in ("cryptography", "tenseal", "zstandard"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(ImportError(name=name), "a private linear layer", "linear")


def quantized_model(
    model: str,
    input_bits: int | None,
    weight_bits: int | None,
    calibration: Path | None,
    modules: str | None = None,
    **unused: Any,
) -> tuple[GPT2, LinearGPT2]:
    """A float model, and the same with its linear layers in integers."""
    from jaxgpt2.linear import LinearGPT2
    from jaxgpt2.methods.linear import LinearBits
    from jaxgpt2.models.gpt2.pretrained import GPT2

    names = {"method": "attention", "changes": "set"}
    refuse_unused(**{names.get(name, name): value for name, value in unused.items()})
    default = LinearBits()
    bits = LinearBits(
        default.weights if weight_bits is None else weight_bits, default.inputs if input_bits is None else input_bits
    )
    with step("loading the model"):
        gpt2 = GPT2.from_pretrained(model)
    with step("calibrating"):
        return gpt2, LinearGPT2.quantize(gpt2, calibration_passages(calibration), bits)


# --- generate -----------------------------------------------------------------------------------


def generate_here(
    prompt: str, mode: str, max_new_tokens: int, sampling: dict[str, Any], as_json: bool, chosen: dict[str, Any]
) -> None:
    """`generate --encrypt linear` without a server: client and owner in one process."""
    if mode == "simulate":
        raise InputError("linear layers have no simulation of their own: --mode quantized gives the same integers")
    if mode == "encrypted":
        require_extra()
    gpt2, model = quantized_model(**chosen)
    client, how = model.client, dataclasses.replace(gpt2.sampling, **sampling)
    result: dict[str, Any] = {"prompt": prompt, "mode": mode, "model": chosen["model"], "modules": LINEAR}
    if mode == "float":
        write_tokens(gpt2, result, gpt2.generate(prompt, max_new_tokens, how), as_json)
        return
    if mode == "quantized":
        tokens = client.generate(prompt, max_new_tokens, model.products(), how, keep_count=False)
        write_tokens(client, result, tokens, as_json)
        return
    from jaxgpt2.serving.masked import LocalOwner, Masked, alone, masked_text, store_for

    needed = client.masks_needed(prompt, max_new_tokens)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        store = store_for(client, Path(directory) / "masks", Path(directory) / "ledgers")
        stack.callback(store.close)
        owner = LocalOwner(model.weights)
        with counting("masks", needed_masks(store, needed)) as progress:
            make_masks(client, store, alone(owner), needed, progress)
        masked = Masked(client, owner, store.claim(needed))
        tokens = client.generate(prompt, max_new_tokens, masked, how)
        write_tokens(client, result, masked_text(tokens, masked), as_json)


def needed_masks(store: MaskStore, tokens: int) -> int:
    """How many masks are made until there are so many: they come in batches."""
    from fhe.rlwe import Parameters

    size = Parameters().poly_modulus_degree
    return -(-max(tokens - store.left(), 0) // size) * size


def make_masks(
    client: LinearClient, store: MaskStore, make: Makes, tokens: int, progress: Callable[[int], object]
) -> None:
    """`masked.prepare`, with whole tokens in its progress."""
    from jaxgpt2.serving.masked import prepare

    done = told = 0.0

    def tell(more: float) -> None:
        nonlocal done, told
        done += more
        if int(done) > told or not told:
            progress(int(done) - int(told))
            told = int(done)

    prepare(client, store, make, tokens, tell)


def generate_remotely(
    prompt: str,
    client: LinearClient,
    connection: Connection,
    masks: Path | None,
    verify: str | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    """`generate --server URL --client DIR` for a client bundle of linear layers."""
    require_extra()
    from jaxgpt2.serving.masked import Masked, masked_text, verifiers_of
    from jaxgpt2.serving.remote import RemoteOwner

    owner = RemoteOwner(connection, client.shapes)
    owner.check(client.identity)
    verifiers = None
    if verify is not None:
        with step("reading the public weights to verify with"):
            verifiers = verifiers_of(client, verify)
    needed = client.masks_needed(prompt, max_new_tokens)
    with contextlib.closing(open_store(client, masks)) as store:
        masked = Masked(client, owner, store.claim(needed), verifiers)
        left = store.left()
    traffic = connection.traffic
    result: dict[str, Any] = {"prompt": prompt, "mode": "server", "modules": LINEAR}
    tokens = client.generate(prompt, max_new_tokens, masked, dataclasses.replace(client.sampling, **sampling))
    write_tokens(
        client,
        result,
        masked_text(tokens, masked),
        as_json,
        facts=lambda: dataclasses.asdict(traffic) | {"masks_left": left},
    )
    note(
        f"{megabytes(traffic.sent)} of masked numbers sent, {megabytes(traffic.received)} received, in "
        f"{traffic.requests} requests; {needed} masks used, {left} left"
        + ("; every product verified" if verifiers is not None else "")
    )


def open_store(client: LinearClient, masks: Path | None) -> MaskStore:
    """The store of a model's masks. Raises MaskError."""
    import platformdirs

    from jaxgpt2.serving.masked import store_for

    directory = masks or Path(platformdirs.user_data_dir("jaxgpt2")) / "masks" / client.identity[:16]
    return store_for(client, directory, Path(platformdirs.user_state_dir("jaxgpt2")) / "masks")


def linear_client(
    command: str, server: str | None, client: Path | None, connecting: dict[str, Any]
) -> tuple[LinearClient, Callable[[], RemoteOwner]]:
    """A client bundle of linear layers, and what connects to the server of its matrices."""
    from jaxgpt2.serving.bundle import Bundle
    from jaxgpt2.serving.linear_bundle import read_client

    if server is None or client is None:
        raise InputError(f"{command} needs --server URL and --client DIR")
    bundle = Bundle.read(client, "client")
    if not bundle.is_linear:
        raise InputError(f"{client} is a bundle of circuits, which need no masks: {command} is for --encrypt linear")
    own = read_client(bundle)
    return own, functools.partial(remote_owner, server, own.shapes, connecting)


def remote_owner(server: str, shapes: dict[str, tuple[int, int]], connecting: dict[str, Any]) -> RemoteOwner:
    """A server's matrices, behind a connection of their own."""
    from jaxgpt2.serving.remote import RemoteOwner

    return RemoteOwner(connect(server, **connecting), shapes)


# --- prepare ------------------------------------------------------------------------------------


@click.command()
@options(connection_options)
@click.option("--masks", type=Directory(), metavar="DIR",
              help="Masks are kept here, readable by you alone.  [default: the user's data directory]")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1, 10**7), default=2048, show_default=True,
              help="Make masks, 2,048 at a time, until there are at least so many.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def prepare(server: str | None, client: Path | None, masks: Path | None, tokens: int, as_json: bool,
            **connecting: Any) -> None:  # fmt: skip
    """Make masks ahead of private texts, which a server of linear layers multiplies under encryption. It sees no text.

    Interrupted, it goes on where it was.
    """
    require_extra()
    from jaxgpt2.executors.processes import cores
    from jaxgpt2.serving.linear_bundle import traffic
    from jaxgpt2.serving.masked import in_processes

    own, open_owner = linear_client("prepare", server, client, connecting)
    owner = open_owner()
    with contextlib.closing(owner.connection):
        owner.check(own.identity)
        with contextlib.closing(open_store(own, masks)) as store:
            count, each = needed_masks(store, tokens), traffic(own)
            took = seconds(count * each["stored_bytes"] * SECONDS_A_STORED_BYTE)
            note(
                f"masks for {count} tokens: {megabytes(count * each['ahead_bytes_up'])} to send, "
                f"{megabytes(count * each['ahead_bytes_down'])} to receive, "
                f"{megabytes(count * each['stored_bytes'])} on the disk; about {took} ({MACHINE}; yours will differ)"
            )
            started = time.monotonic()
            with in_processes(open_owner, cores()) as make, counting("masks", count) as progress:
                make_masks(own, store, make, tokens, progress)
            took = time.monotonic() - started
            result = {"made": count, "left": store.left(), "seconds": took,
                      "seconds_per_token": took / count if count else None, **each}  # fmt: skip
            emit(as_json, result, [f"{count} masks made in {seconds(took)}, {result['left']} left"])


# --- eval, compile, sweep -----------------------------------------------------------------------


def evaluate(
    passages: list[str], ks: Sequence[int], max_tokens: int | None, mode: str, as_json: bool, chosen: dict[str, Any]
) -> None:
    """`eval --encrypt linear`."""
    from jaxgpt2.evaluation import evaluate_linear

    if mode != "quantized":
        raise InputError(f"--encrypt linear computes the same integers in every mode: leave --mode {mode} out")
    gpt2, model = quantized_model(**chosen)
    started = time.monotonic()
    with step(f"evaluating {len(passages)} passages"):
        measured = evaluate_linear(gpt2, model.client, model.products(), passages, ks, max_tokens)
    bits = model.client.bits
    result = {
        **dataclasses.asdict(measured), "mode": mode, "model": chosen["model"], "modules": LINEAR,
        "bits": dataclasses.asdict(bits), "seconds": time.monotonic() - started,
    }  # fmt: skip
    lines = [
        f"linear layers of {chosen['model']}, weights of {bits.weights} bits, inputs of {bits.inputs}: "
        f"{measured.positions} positions in {measured.passages} passages",
        "",
        f"{'':22}{'quantized':>12}{'float':>12}",
        *(f"{f'top-{k} agreement':22}{measured.top_k[k]:>12.4f}{1:>12}" for k in measured.top_k),
        f"{'KL from float (nats)':22}{measured.kl:>12.2e}{0:>12}",
        f"{'perplexity':22}{measured.perplexity:>12.3f}{measured.perplexity_float:>12.3f}",
    ]
    emit(as_json, result, lines)


def compile_linear(out: Path | None, as_json: bool, chosen: dict[str, Any]) -> None:
    """`compile --encrypt linear`."""
    from fhe import rlwe
    from jaxgpt2.serving.linear_bundle import traffic, write_bundles

    _, model = quantized_model(**chosen)
    reports, parameters = model.reports(), rlwe.Parameters()
    result: dict[str, Any] = {
        "modules": LINEAR,
        "bits": dataclasses.asdict(model.client.bits),
        "matrices": len(reports),
        "weights": sum(report.inputs * report.outputs for report in reports.values()),
        "failure_log2": max(report.failure_log2 for report in reports.values()),
        "largest_sum": max(report.largest_sum for report in reports.values()),
        "security_bits": parameters.security_bits,
        "poly_modulus_degree": parameters.poly_modulus_degree,
        "evaluation_key_bytes": 0,
        **traffic(model.client),
    }
    if out is not None:
        result["bundle"] = write_bundles(model, out, result)
        note(f"wrote {out / 'server'}, with the matrices, and {out / 'client'}, without them")
    lines = [
        f"{result['matrices']} matrices, {result['weights'] / 1e6:,.1f} million weights of "
        f"{model.client.bits.weights} bits, inputs of {model.client.bits.inputs} bits",
        f"security              {parameters.security_bits} bits (RLWE, degree {parameters.poly_modulus_degree}), "
        "no evaluation keys",
        f"a batch fails         with probability 2^{result['failure_log2']:.0f} at most",
        f"largest sum           {result['largest_sum']:,} of {2**31 - 1:,}",
        f"ahead, a token        {megabytes(result['ahead_bytes_up'])} up, {megabytes(result['ahead_bytes_down'])} "
        f"down, {megabytes(result['stored_bytes'])} kept",
        f"online, a token       {megabytes(result['online_bytes_up'])} up, "
        f"{megabytes(result['online_bytes_down'])} down, {result['matrices']} round trips",
    ]
    emit(as_json, result, lines)


def sweep_linear(
    model: str,
    weight_bits: tuple[int, ...],
    input_bits: tuple[int, ...],
    passages: list[str],
    calibration: list[str],
    ks: tuple[int, ...],
    max_tokens: int | None,
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """`sweep --encrypt linear`: a row for every width, into the same kind of directory as other sweeps."""
    from jaxgpt2.evaluation import check_disjoint
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.sweeps import linear as sweeping
    from jaxgpt2.sweeps.store import SweepDirectory, require_extra

    require_extra()
    check_disjoint(calibration, passages)
    widths = sweeping.grid(weight_bits, input_bits)
    gpt2 = GPT2.from_pretrained(model)
    texts = {"passages": passages, "calibration": calibration}
    identity = {
        "model": model, "weights": gpt2.fingerprint(), "ks": list(ks),
        "grid": [sweeping.key_of(bits) for bits in widths],
        **{name: hashlib.sha256("\n".join(some).encode()).hexdigest() for name, some in texts.items()},
        **({} if max_tokens is None else {"max_tokens": max_tokens}),
    }  # fmt: skip
    started = time.monotonic()
    directory = SweepDirectory.open(out, identity, resume)
    missing = [bits for bits in widths if sweeping.key_of(bits) not in directory.rows]
    with counting("widths", len(widths)) as progress:
        progress(len(widths) - len(missing))
        for row in sweeping.measured(gpt2, missing, passages, calibration, ks, max_tokens):
            directory.append([row])
            progress(1)
    frame = directory.finish([sweeping.key_of(bits) for bits in widths])
    result = {"rows": len(frame), "table": str(out / "rows.parquet"), "csv": str(out / "rows.csv"), "figures": [],
              "seconds": time.monotonic() - started}  # fmt: skip
    shown = ["weight_bits", "input_bits", "kl", f"top_{ks[0]}", "perplexity", "perplexity_float", "error"]
    emit(as_json, result, frame[[name for name in shown if name in frame]].to_string(index=False).splitlines())
