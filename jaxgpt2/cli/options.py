"""What commands share: options, and the models that they name."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxgpt2.errors import InputError, MissingExtra
from jaxgpt2.progress import note, seconds, step

if TYPE_CHECKING:
    from fhe import FHEConfig
    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.methods import MethodConfig
    from jaxgpt2.modules import Module
    from jaxgpt2.serving.remote import Connection

# The method where the backend is named and no method is.
DEFAULT_METHODS = {"ckks": "polynomial"}


MODES = ("float", "quantized", "simulate", "encrypted")


ROUNDING = click.Choice(["exact", "approximate", "none"])


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one, in the order in which --help shall list them."""
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


class Directory(click.Path):
    """A directory that will be made or written to: one that cannot be is refused before anything is computed."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return check_writable(Path(super().convert(value, param, ctx)))  # pyright: ignore[reportArgumentType]


class File(Directory):
    """A file that will be written, in a directory that is there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(click.Path.convert(self, value, param, ctx))  # pyright: ignore[reportArgumentType]
        if path.is_dir():
            raise InputError(f"{path} is a directory: give a file")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path} cannot be written: there is no directory {path.absolute().parent}")
        check_writable(path.absolute().parent)
        return path


def check_writable(path: Path) -> Path:
    """The path of a directory that is there and may be written to, or can be made.

    Raises:
        InputError: it is not, or cannot.
    """
    there = next(each for each in (path, *path.absolute().parents) if os.path.exists(each))  # noqa: PTH110 (asks in silence)
    if not there.is_dir():
        what = "is a file: give a directory" if there == path else f"cannot be made: {there} is a file"
        raise InputError(f"{path} {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written to: {there} is somebody else's, or read-only")
    return path


model_options = options(
    click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR|HUB_ID", help="Which GPT-2."),
)


module_options = options(
    click.option("--encrypt", "modules", metavar="MODULES",
                 help="What is encrypted: heads, as 0.1,2.3 (layer.head, from 0), a layer's whole attention, as 0.attn,"
                      " or linear: all linear layers of all blocks.  [default: 0.0]"),
    click.option("--configs", type=click.Path(path_type=Path), metavar="FILE",
                 help="Method, bits and options of every module, as tune writes them; instead of the options below."),
    click.option("--attention", "method",
                 help="Attention method: a name, see info, or FILE.py:NAME.  [default: polynomial for --backend ckks, "
                      "else the checkpoint's configs, else lowrank]"),
    click.option("--bits", type=int,
                 help="Bits of activations; the method derives the other widths from them.  [default: 4]"),
    click.option("--input-bits", type=int, help="Bits of inputs, instead of what --bits makes them."),
    click.option("--weight-bits", type=int, help="Bits of weights, instead of what --bits makes them."),
    click.option("--activation-bits", type=int, help="Bits of activations alone."),
    click.option("--rounding-threshold-bits", type=int, help="Top bits of a sum; a lookup sees no others."),
    click.option("--set", "changes", multiple=True, metavar="NAME=VALUE",
                 help="An option of the method, as score_rank=8; may be repeated."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                 help="Text to calibrate on, one passage a line.  [default: bundled]"),
)  # fmt: skip


compile_options = options(
    click.option("--backend", help="FHE backend; see info.  [default: the one that the method is made for]"),
    click.option("--p-error", type=float,
                 help="Probability that one lookup is wrong.  [default: as tuned, else the method's]"),
    click.option("--rounding", type=ROUNDING,
                 help="How low bits are rounded away before a lookup.  [default: as tuned, else the method's]"),
    click.option("--cache", type=Directory(), metavar="DIR",
                 help="Calibrated modules, circuits and keys are kept here.  [default: the user's cache directory]"),
)  # fmt: skip


connection_options = options(
    click.option("--server", metavar="URL", help="Server that computes what is encrypted; needs --client."),
    click.option("--client", type=click.Path(path_type=Path), metavar="DIR",
                 help="Client bundle, from compile --out; it says what the model is and what is encrypted."),
    click.option("--token", envvar="JAXGPT2_TOKEN", show_envvar=True,
                 help="For the server. On the command line, unlike in the environment, others can see it."),
    click.option("--tls-ca", "authority", type=click.Path(path_type=Path), metavar="FILE",
                 help="Certificate of the authority that the server has its own from."),
    click.option("--tls-cert", "certificate", type=click.Path(path_type=Path), metavar="FILE",
                 help="The client's own certificate, for a server that wants one."),
    click.option("--tls-key", "certificate_key", type=click.Path(path_type=Path), metavar="FILE",
                 help="The private key of --tls-cert."),
    click.option("--insecure", is_flag=True, help="Allow a server without TLS on another machine."),
)  # fmt: skip


server_options = options(
    connection_options,
    click.option("--keys", "secret_keys", type=Directory(), metavar="DIR",
                 help="Secret keys for a server of circuits are kept here.  [default: the user's data directory]"),
    click.option("--send-my-text-unencrypted", is_flag=True,
                 help="For tests: use client bundles of the backend clear, which hides nothing from the server."),
    click.option("--masks", type=Directory(), metavar="DIR",
                 help="Masks for a server of linear layers, from prepare.  [default: the user's data directory]"),
    click.option("--verify", metavar="tiny|DIR|HUB_ID",
                 help="Check every product of a server of linear layers against these public weights."),
)  # fmt: skip


mode_option = click.option("--mode", type=click.Choice(MODES), default="float", show_default=True,
                           help="How the encrypted modules are computed.")  # fmt: skip


sampling_options = options(
    click.option("--temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, help="Draw only among the k likeliest tokens."),
    click.option("--top-p", type=float,
                 help="Draw only among the likeliest tokens that together reach this probability."),
    click.option("--repetition-penalty", type=float, help="Above 1, tokens that the text has already are less likely."),
    click.option("--no-repeat-ngram-size", type=int, metavar="N", help="No N tokens in a row come twice; 0: they may."),
    click.option("--seed", default=0, show_default=True, help="Seed of random draws. These six options win over the "
                 "model's own generation_config.json."),
)  # fmt: skip


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")


def make_encrypted(
    model: str,
    modules: str | None,
    configs: Path | None,
    method: str | None,
    bits: int | None,
    input_bits: int | None,
    weight_bits: int | None,
    activation_bits: int | None,
    rounding_threshold_bits: int | None,
    changes: tuple[str, ...],
    backend: str | None = None,
) -> EncryptedGPT2:
    """The model that the options name."""
    from jaxgpt2 import methods
    from jaxgpt2.encrypted import EncryptedGPT2
    from jaxgpt2.methods import MethodConfig
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.modules import ModuleError, parse_modules, read_configs
    from weights import locate

    options = (method, bits, input_bits, weight_bits, activation_bits, rounding_threshold_bits)
    given = any(option is not None for option in options) or bool(changes)
    if configs is not None and given:
        raise InputError("--configs FILE says method, bits and options: leave the options for them out")
    if configs is None and not given and backend not in DEFAULT_METHODS:
        # A checkpoint may bring the configurations that its heads do best with.
        tuned = locate(model) / "configs.json"
        if tuned.exists() and "attn" not in (modules or ""):
            modules, configs = "0.0" if modules is None else modules, tuned
    if configs is not None:
        gpt2 = GPT2.from_pretrained(model)
        known = read_configs(configs, gpt2.config)
        chosen = tuple(known) if modules is None else parse_modules(modules, gpt2.config)
        for module in chosen:
            if module not in known:
                raise ModuleError(f"{configs} has nothing for module {module}; it has: {', '.join(map(str, known))}")
        return EncryptedGPT2(gpt2, {module: known[module] for module in chosen})
    # Only softmax computes whole layers.
    default = "softmax" if "attn" in (modules or "") else "lowrank"
    method = methods.named(method or DEFAULT_METHODS.get(backend or "", default))
    if not methods.get(method).by_lookups:
        _refuse_for_lookups(
            method,
            bits=bits,
            input_bits=input_bits,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            rounding_threshold_bits=rounding_threshold_bits,
        )
    apart = {
        "inputs": input_bits,
        "weights": weight_bits,
        "activations": activation_bits,
        "rounding_threshold": rounding_threshold_bits,
    }
    activations = next((n for n in (activation_bits, bits) if n is not None), 4)
    widths = methods.get(method).bits(activations)
    widths = dataclasses.replace(widths, **{name: n for name, n in apart.items() if n is not None})
    config = MethodConfig.of(method, widths, parse_changes(changes))
    return EncryptedGPT2.encrypt(GPT2.from_pretrained(model), "0.0" if modules is None else modules, config)


def parse_changes(changes: Iterable[str]) -> dict[str, int]:
    """`NAME=VALUE` options of a method."""
    parsed = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            parsed[name.strip()] = int(value)
        except ValueError:
            raise InputError(f"--set {change!r} cannot be read: wanted NAME=WHOLE NUMBER, as score_rank=8") from None
    return parsed


# More values of one option, or more configurations, than anybody measures: most likely a slip of the hand.
MOST = 1_000_000


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """`2-4,8` as (2, 3, 4, 8).

    Raises:
        InputError: it is not of that form, or names nothing, or too much.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part, re.ASCII)
        if match is None:
            raise InputError(f"{option} {text[:80]!r} cannot be read: wanted numbers and ranges, as 2-4,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{option} {text[:80]!r} names nothing: {first} is more than {last}")
        if len(numbers) + last - first >= MOST:
            raise InputError(f"{option} {text[:80]!r} names more than {MOST:,} numbers: give fewer")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def _refuse_for_lookups(method: str, **given: Any) -> None:
    """Raises InputError for an option that was given and says nothing of a method without lookups."""
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect on {method!r}, which has no lookups: leave it out")


def make_fhe_configs(encrypted: EncryptedGPT2, p_error: float | None, rounding: Any) -> dict[Module, FHEConfig]:
    """Of every module, with what the options change."""
    from jaxgpt2 import methods

    for name in {config.method for config in encrypted.configs.values()}:
        if not methods.get(name).by_lookups:
            _refuse_for_lookups(name, p_error=p_error, rounding=rounding)
    try:
        return encrypted.fhe_configs(p_error, rounding)
    except ValueError as error:
        raise InputError(str(error)) from None


def calibration_passages(path: Path | None) -> list[str]:
    from jaxgpt2.evaluation import bundled_passages, read_passages

    return bundled_passages("calibration") if path is None else read_passages(path)


def connect(
    server: str,
    token: str | None,
    authority: Path | None,
    certificate: Path | None,
    certificate_key: Path | None,
    insecure: bool,
) -> Connection:
    """A connection as the options say."""
    try:
        from jaxgpt2.serving.remote import Connection
    except ImportError as error:
        raise MissingExtra(error, "--server", "client") from None
    if (certificate is None) != (certificate_key is None):
        raise InputError("a certificate and its key go together: give --tls-cert and --tls-key")
    own = None if certificate is None or certificate_key is None else (certificate, certificate_key)
    return Connection(server, token, authority, own, insecure)


def cache_directory(path: Path | None) -> Path:
    """The directory that was given, or the user's. Raises InputError: it cannot be used."""
    if path is None:
        import platformdirs

        path = check_writable(Path(platformdirs.user_cache_dir("jaxgpt2")))
    return path


def calibrated(encrypted: EncryptedGPT2, passages: list[str], max_tokens: int, cache: Path) -> EncryptedGPT2:
    with step("calibrating (kept for the next run)"):
        return encrypted.calibrate(passages, max_tokens, cache / "calibrated")


def compiled(
    encrypted: EncryptedGPT2,
    passages: list[str],
    seq_len: int,
    fhe_configs: dict[Module, FHEConfig],
    backend: str | None,
    cache: Path,
) -> EncryptedGPT2:
    names = ", ".join(map(str, encrypted.modules))
    with step(f"compiling {names} for {seq_len} tokens"):
        return encrypted.compile(passages, seq_len, fhe_configs, backend, cache / "circuits")


def make_keys(encrypted: EncryptedGPT2, cache: Path) -> Any:
    with step("making keys (kept for the next run)"):
        return encrypted.make_keys(cache / "keys")


def total_cost(costs: Mapping[Any, Any]) -> Any:
    """Of all modules together: a `fhe.RunCost`."""
    return functools.reduce(operator.add, costs.values())


def announce_run(encrypted: EncryptedGPT2, tokens: int, prompt: int | None = None) -> None:
    """Says in advance what reading a text of so many tokens will take, those after the prompt one by one."""
    cost = total_cost(encrypted.costs(prompt or tokens))
    if prompt is not None and prompt < tokens:
        cost += total_cost(encrypted.costs(tokens, prompt))
    took = seconds(cost.estimated_run_seconds)
    note(f"{cost.describe()} for {tokens} tokens: about {took} ({cost.machine}; yours will differ)")


def modules_of(encrypted: EncryptedGPT2) -> dict[str, Any]:
    """What is encrypted and how, for a JSON object."""
    return {
        "modules": ",".join(map(str, encrypted.modules)),
        "configs": {str(module): config.to_json() for module, config in encrypted.configs.items()},
    }


def describe(encrypted: EncryptedGPT2) -> str:
    """The configurations of a model for people: one where all are equal, how many else."""
    configs = set(encrypted.configs.values())
    if len(configs) > 1:
        return f"{len(configs)} configurations"
    return describe_config(configs.pop())


def describe_config(config: MethodConfig) -> str:
    """`lowrank, score_rank 16, bits 4/4/4, lookups 6`, and `, p_error 0.01, approximate` where it was chosen."""
    options = "".join(f", {name} {value}" for name, value in config.options.items())
    bits = config.bits
    lookups = "" if bits.rounding_threshold is None else f", lookups {bits.rounding_threshold}"
    encryption = config.encryption
    noise = "" if encryption is None else f", p_error {encryption.p_error:g}, {encryption.rounding}"
    return f"{config.method}{options}, bits {bits.inputs}/{bits.weights}/{bits.activations}{lookups}{noise}"


def refuse_given(context: click.Context, why: str, head: Iterable[str], *names: str, beside: str = "--server") -> None:
    """Raises InputError for an option that was given and has no place here."""
    for name in (*head, *names):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = next(option for option in context.command.params if option.name == name)
            raise InputError(f"{option.opts[0]} has no place beside {beside}: {why}")


def emit(as_json: bool, result: dict[str, Any], lines: Iterable[str]) -> None:
    """The result of a command: one JSON object, or lines for people."""
    if as_json:
        click.echo(json.dumps(result))
    else:
        for line in lines:
            click.echo(line)
