"""The command line. Results go to standard output, everything else to standard error; bad input exits with 2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from jaxgpt2.errors import InputError
from jaxgpt2.progress import console, note, seconds, step

# What computes a head if the backend is named and no method.
DEFAULT_FORMULAS = {"ckks": "polynomial"}

MODES = ("float", "quantized", "simulate", "encrypted")
ROUNDING = click.Choice(["exact", "approximate", "none"])


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that input causes become one line on standard error and exit status 2."""
    from fhe import FHEError
    from weights import CheckpointError

    try:
        yield
    except (InputError, CheckpointError, FHEError) as error:
        click.echo(f"jaxgpt2: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


# Commands that live in other modules, imported when they are called: name to module and attribute.
ELSEWHERE = {
    "serve": ("jaxgpt2.cli.serve", "serve"),
    "sweep": ("jaxgpt2.cli.sweep", "sweep"),
    "token": ("jaxgpt2.cli.serve", "token"),
    "tune": ("jaxgpt2.cli.sweep", "tune"),
}


class Commands(click.Group):
    """A group of commands with `one_line_errors`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE:
            module, attribute = ELSEWHERE[cmd_name]
            return getattr(importlib.import_module(module), attribute)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one, in the order in which --help shall list them."""
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


model_options = options(
    click.option("--model", default="tiny", show_default=True, metavar="tiny|DIR|HUB_ID", help="Which GPT-2."),
)
head_options = options(
    click.option("--head", "heads", metavar="L.H[,L.H...]",
                 help="Protected heads: layer.head from 0, or L.all for a whole block.  [default: 0.0]"),
    click.option("--configs", type=click.Path(path_type=Path), metavar="FILE",
                 help="Method, bits and options of every head, as tune writes them; instead of the options below."),
    click.option("--attention", "method",
                 help="Attention method; see info.  [default: polynomial for --backend ckks, else the checkpoint's "
                      "configs, else lowrank]"),
    click.option("--bits", type=int,
                 help="Bits of activations, and of all else what the method has with them.  [default: 4]"),
    click.option("--input-bits", type=int, help="Bits of inputs."),
    click.option("--weight-bits", type=int, help="Bits of weights."),
    click.option("--activation-bits", type=int, help="Bits of activations."),
    click.option("--lookup-bits", type=int, help="Top bits of a sum that a lookup sees."),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                 help="An option of the method, as score_rank=8; may be repeated."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                 help="Text to calibrate on, one passage a line.  [default: bundled]"),
)  # fmt: skip
compile_options = options(
    click.option("--backend", help="FHE backend; see info.  [default: the one that the method is made for]"),
    click.option("--p-error", type=float,
                 help="Probability that one lookup is wrong.  [default: the config's, else the method's]"),
    click.option("--rounding", type=ROUNDING,
                 help="How low bits are rounded away before a lookup.  [default: the config's, else the method's]"),
    click.option("--cache", type=click.Path(path_type=Path), metavar="DIR",
                 help="Compiled circuits and keys are kept here.  [default: the user's cache directory]"),
)  # fmt: skip
server_options = options(
    click.option("--server", metavar="URL", help="Compute protected heads on this server; needs --client."),
    click.option("--client", type=click.Path(path_type=Path), metavar="DIR",
                 help="Client bundle, from compile; it is used instead of --model and all of its options."),
    click.option("--keys", "secret_keys", type=click.Path(path_type=Path), metavar="DIR",
                 help="Secret keys for a server are kept here.  [default: the user's data directory]"),
    click.option("--token", envvar="JAXGPT2_TOKEN", show_envvar=True,
                 help="For the server. On the command line, unlike in the environment, others can see it."),
    click.option("--tls-ca", "authority", type=click.Path(path_type=Path), metavar="FILE",
                 help="Certificate of the authority that the server has its own from."),
    click.option("--tls-cert", "certificate", type=click.Path(path_type=Path), metavar="FILE",
                 help="The client's own certificate, for a server that wants one."),
    click.option("--tls-key", "certificate_key", type=click.Path(path_type=Path), metavar="FILE",
                 help="The key of it."),
    click.option("--insecure", is_flag=True, help="Allow a server without TLS on another machine."),
)  # fmt: skip
mode_option = click.option("--mode", type=click.Choice(MODES), default="float", show_default=True,
                           help="How the protected heads are computed.")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")


def make_hybrid(model: str, heads: str | None, configs: Path | None, method: str | None, bits: int | None,
                input_bits: int | None, weight_bits: int | None, activation_bits: int | None, lookup_bits: int | None,
                settings: tuple[str, ...], backend: str | None = None) -> Any:  # fmt: skip
    from jaxgpt2 import methods
    from jaxgpt2.encrypted import EncryptedGPT2, ModuleError, parse_modules, read_configs
    from jaxgpt2.methods import MethodConfig
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from weights import locate

    options = (method, bits, input_bits, weight_bits, activation_bits, lookup_bits)
    given = any(option is not None for option in options) or bool(settings)
    if configs is not None and given:
        raise InputError("--configs FILE says method, bits and options: leave the options for them out")
    if configs is None and not given and backend not in DEFAULT_FORMULAS:
        # A checkpoint may bring the configs that its heads do best with.
        tuned = locate(model) / "configs.json"
        if tuned.exists() and not (heads or "").count("all"):
            heads, configs = heads or "0.0", tuned
    if configs is not None:
        gpt2 = GPT2.from_pretrained(model)
        known = read_configs(configs, gpt2.config)
        modules = tuple(known) if heads is None else parse_modules(heads, gpt2.config)
        for module in modules:
            if module not in known:
                raise ModuleError(f"{configs} has no config for head {module}; it has: {', '.join(map(str, known))}")
        return EncryptedGPT2(gpt2, {module: known[module] for module in modules})
    method = method or DEFAULT_FORMULAS.get(backend or "", "lowrank")
    chosen = {"inputs": input_bits, "weights": weight_bits, "activations": activation_bits, "lookup": lookup_bits}
    activations = next((n for n in (activation_bits, bits) if n is not None), 4)
    widths = methods.get(method).bits(activations)
    widths = dataclasses.replace(widths, **{name: n for name, n in chosen.items() if n is not None})
    config = MethodConfig.of(method, widths, parse_settings(settings))
    return EncryptedGPT2.protect(GPT2.from_pretrained(model), heads or "0.0", config)


def parse_settings(settings: Iterable[str]) -> dict[str, int]:
    """`NAME=VALUE` options of a method."""
    parsed = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            parsed[name.strip()] = int(value)
        except ValueError:
            raise InputError(f"--set {setting!r} cannot be read: wanted NAME=WHOLE NUMBER, as score_rank=8") from None
    return parsed


def make_settings(hybrid: Any, p_error: float | None, rounding: str | None) -> Any:
    try:
        return hybrid.settings(p_error, rounding)
    except ValueError as error:
        raise InputError(str(error)) from None


def calibration_passages(path: Path | None) -> list[str]:
    from jaxgpt2.evaluation import read_passages
    from weights.checkpoint import TINY

    return read_passages(path or TINY / "calibration.txt")


def cache_directory(path: Path | None) -> Path:
    if path is None:
        import platformdirs

        path = Path(platformdirs.user_cache_dir("jaxgpt2"))
    return path


def compiled(
    hybrid: Any, passages: list[str], seq_len: int, settings: Any, backend: str | None, cache: Path | None
) -> Any:
    names = ", ".join(map(str, hybrid.modules))
    with step(f"compiling head {names} for {seq_len} tokens"):
        return hybrid.compile(passages, seq_len, settings, backend, cache_directory(cache) / "circuits")


def make_keys(hybrid: Any, cache: Path | None) -> Any:
    with step("making keys (kept for the next run)"):
        return hybrid.make_keys(cache_directory(cache) / "keys")


def total_cost(costs: Mapping[Any, Any]) -> Any:
    """Of all modules together: a `fhe.RunCost`."""
    return functools.reduce(operator.add, costs.values())


def announce_run(hybrid: Any, tokens: int, prompt: int | None = None) -> None:
    """Says in advance what reading a text of so many tokens will take, those after the prompt one by one."""
    cost = total_cost(hybrid.costs(prompt or tokens))
    if prompt is not None and prompt < tokens:
        cost += total_cost(hybrid.costs(tokens, prompt))
    took = seconds(cost.estimated_run_seconds)
    note(f"{cost.describe()} for {tokens} tokens: about {took} ({cost.machine}; yours will differ)")


def heads_of(hybrid: Any) -> dict[str, Any]:
    """What is protected and how, for a JSON object."""
    return {
        "head": ",".join(map(str, hybrid.modules)),
        "configs": {str(module): config.to_json() for module, config in hybrid.configs.items()},
    }


def describe(hybrid: Any) -> str:
    """The configs of a hybrid model for people: one where all are equal, how many else."""
    configs = set(hybrid.configs.values())
    if len(configs) > 1:
        return f"{len(configs)} configs"
    return describe_recipe(configs.pop())


def describe_recipe(config: Any) -> str:
    """`lowrank, score_rank 16, bits 4/4/4, lookups 6`, and `, p_error 0.01, approximate` where the config says so."""
    options = "".join(f", {name} {value}" for name, value in config.settings.items())
    bits = config.bits
    lookups = "" if bits.lookup is None else f", lookups {bits.lookup}"
    encryption = config.encryption
    noise = "" if encryption is None else f", p_error {encryption.p_error:g}, {encryption.rounding}"
    return f"{config.method}{options}, bits {bits.inputs}/{bits.weights}/{bits.activations}{lookups}{noise}"


def refuse_given(context: click.Context, why: str, head: Iterable[str], *names: str) -> None:
    """Raises InputError for an option that was given and has no place here."""
    for name in (*head, *names):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = next(option for option in context.command.params if option.name == name)
            raise InputError(f"{option.opts[0]} has no place beside --server: {why}")


def emit(as_json: bool, result: dict[str, Any], lines: Iterable[str]) -> None:
    """The result of a command: one JSON object, or lines for people."""
    if as_json:
        click.echo(json.dumps(result))
    else:
        for line in lines:
            click.echo(line)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(importlib.metadata.version("jaxgpt2"))
def main() -> None:
    """GPT-2 of which chosen attention heads run on encrypted data."""


@main.command()
@click.argument("prompt")
@options(model_options, head_options, mode_option, compile_options, server_options)
@click.option("--max-new-tokens", type=click.IntRange(1), default=20, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw among the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens that reach this probability only.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler whose workers run encrypted heads.")
@json_option
@click.pass_context
def generate(context: click.Context, prompt: str, calibration: Path | None, mode: str, backend: str | None,
             p_error: float | None, rounding: str | None, cache: Path | None, max_new_tokens: int, temperature: float,
             top_k: int | None, top_p: float | None, seed: int, scheduler: str | None, as_json: bool,
             server: str | None, client: Path | None, secret_keys: Path | None, token: str | None,
             authority: Path | None, certificate: Path | None, certificate_key: Path | None, insecure: bool,
             **head: Any) -> None:  # fmt: skip
    """Continue PROMPT; with --server and --client, a server computes the protected heads, and never sees the text."""
    from jaxgpt2.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    if server is not None or client is not None:
        from jaxgpt2.cli.serve import generate_remotely

        if server is None or client is None:
            raise InputError("a server needs a client bundle, and a client bundle a server: give --server and --client")
        refuse_given(context, "the client bundle says what the model is", head, "calibration", "mode", "backend",
                     "p_error", "rounding", "cache", "scheduler")  # fmt: skip
        generate_remotely(prompt, server, client, secret_keys, token, authority, certificate, certificate_key, insecure,
                          max_new_tokens, sampling, as_json)  # fmt: skip
        return
    if scheduler is not None and mode != "encrypted":
        raise InputError(f"--scheduler is for --mode encrypted, not for {mode}: leave it out")
    with step("loading the model"):
        hybrid = make_hybrid(**head, backend=backend)
    settings = make_settings(hybrid, p_error, rounding)
    gpt2 = hybrid.gpt2
    result: dict[str, Any] = {"prompt": prompt, "mode": mode, "model": head["model"]}
    keys: Any = None
    if mode != "float":
        length = len(gpt2.encode(prompt, room=max_new_tokens)) + max_new_tokens - 1
        passages = calibration_passages(calibration)
        with step("calibrating"):
            hybrid = hybrid.calibrate(passages, length)
        if mode != "quantized":
            hybrid = compiled(hybrid, passages, length, settings, backend, cache)
            result["reports"] = {str(module): circuit.report.to_json() for module, circuit in hybrid.circuits.items()}
        if mode == "encrypted":
            keys = make_keys(hybrid, cache)
            announce_run(hybrid, length, length - max_new_tokens + 1)
        result |= heads_of(hybrid)
    waiting = (lambda n: f"token {n} of {max_new_tokens}") if mode in ("simulate", "encrypted") else None
    with contextlib.ExitStack() as stack:
        if scheduler is not None:
            from jaxgpt2 import distribute

            cluster = distribute.connect(scheduler)
            with step("sending circuits and evaluation keys"):
                parties = {
                    module: distribute.send(cluster, each, keys[module]) for module, each in hybrid.circuits.items()
                }
            text = hybrid.continue_text(prompt, max_new_tokens, hybrid.engine_of(parties), sampling)
        elif mode == "encrypted":
            engine = stack.enter_context(hybrid.over_cores(keys))
            text = hybrid.continue_text(prompt, max_new_tokens, engine, sampling)
        else:
            text = hybrid.generate(prompt, max_new_tokens, mode, sampling)
        write_tokens(gpt2, result, text, as_json, waiting)


def write_tokens(
    gpt2: Any, result: dict[str, Any], iterator: Iterator[int], as_json: bool,
    waiting: Callable[[int], str] | None = None, facts: Callable[[], dict[str, Any]] = dict,
) -> None:  # fmt: skip
    """Writes tokens as they come, then the result with what became of its prompt.

    waiting: what to say while the token of this number is made, if that takes a while. facts: what the result says
    beside that.
    """
    tokens: list[int] = []
    stream = gpt2.stream()
    # On a terminal, what is said while waiting takes the line of the text: so it says the text too.
    alive = waiting is not None and not as_json and console.is_terminal and sys.stdout.isatty()
    shown = result["prompt"]
    if not as_json and not alive:
        click.echo(shown, nl=False)
    started = time.monotonic()
    try:
        while True:
            saying = contextlib.nullcontext()
            if waiting is not None:
                label = waiting(len(tokens) + 1)
                saying = step(f"{shown}  [{label}]", lasting=False) if alive else step(label)
            with saying:
                token = next(iterator, None)
            if token is None:
                break
            tokens.append(token)
            piece = stream(token)
            shown += piece
            if not as_json and not alive:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    finally:
        if alive:
            click.echo(shown, nl=False)
    took = time.monotonic() - started
    result |= {
        "text": gpt2.text(tokens),
        "tokens": tokens,
        "seconds": took,
        "seconds_per_token": took / len(tokens) if tokens else None,
        **facts(),
    }
    emit(as_json, result, [""])


@main.command("eval")
@options(model_options, head_options)
@click.option("--mode", type=click.Choice(MODES[1:]), default="quantized", show_default=True,
              help="How the protected heads are computed.")  # fmt: skip
@options(compile_options)
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Evaluation text, one passage a line.  [default: bundled]")  # fmt: skip
@click.option("--top-k", "ks", default="1,5,10", show_default=True, metavar="K[,K...]", help="Agreement at these k.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N passages.")
@json_option
def evaluate_command(calibration: Path | None, mode: str, backend: str | None, p_error: float | None,
                     rounding: str | None, cache: Path | None, text: Path | None, ks: str, limit: int | None,
                     as_json: bool, **head: Any) -> None:  # fmt: skip
    """How much a quantized head changes the model on a text."""
    from jaxgpt2 import evaluation
    from weights.checkpoint import TINY

    if not all(part.strip().isdigit() for part in ks.split(",")):
        raise InputError(f"--top-k {ks!r} cannot be read: wanted whole numbers with commas between, as 1,5,10")
    passages = evaluation.read_passages(text or TINY / "eval.txt")[:limit]
    calibrating = calibration_passages(calibration)
    evaluation.check_disjoint(calibrating, passages)
    with step("loading the model"):
        hybrid = make_hybrid(**head, backend=backend)
    settings = make_settings(hybrid, p_error, rounding)
    longest = evaluation.longest_passage(hybrid.gpt2, passages)
    with step("calibrating"):
        hybrid = hybrid.calibrate(calibrating, longest)
    keys = None
    if mode != "quantized":
        hybrid = compiled(hybrid, calibrating, longest, settings, backend, cache)
    if mode == "encrypted":
        keys = make_keys(hybrid, cache)
        announce_run(hybrid, longest)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(hybrid.over_cores(keys)) if mode == "encrypted" else hybrid.engine(mode)
        stack.enter_context(step(f"evaluating {len(passages)} passages"))
        measured = evaluation.evaluate(hybrid, passages, engine, [int(part) for part in ks.split(",")])
    result = {
        **dataclasses.asdict(measured),
        "recovered_kl": measured.recovered_kl,
        "mode": mode,
        "model": head["model"],
        **heads_of(hybrid),
        "seconds": time.monotonic() - started,
    }
    lines = [
        f"head {result['head']} of {head['model']}, {describe(hybrid)}, {mode}: "
        f"{measured.positions} positions in {measured.passages} passages",
        "",
        f"{'':22}{'quantized':>12}{'ablated':>12}",
        *(
            f"{f'top-{k} agreement':22}{measured.top_k[k]:>12.4f}{measured.top_k_ablated[k]:>12.4f}"
            for k in measured.top_k
        ),
        f"{'KL from float (nats)':22}{measured.kl:>12.2e}{measured.kl_ablated:>12.2e}",
        f"{'recovered KL':22}{measured.recovered_kl:>12.4f}{0:>12}",
        f"{'head error':22}{measured.head_error:>12.4f}{1:>12}",
    ]
    emit(as_json, result, lines)


@main.command("compile")
@options(model_options, head_options, compile_options)
@click.option("--seq-len", type=click.IntRange(1), default=6, show_default=True, help="Longest text, in tokens.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Write server bundle, client bundle and report here.")  # fmt: skip
@json_option
def compile_command(calibration: Path | None, backend: str | None, p_error: float | None, rounding: str | None,
                    cache: Path | None, seq_len: int, out: Path | None, as_json: bool,
                    **head: Any) -> None:  # fmt: skip
    """Compile the protected heads, and say what they cost."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory: give another --out, or remove it")
    with step("loading the model"):
        hybrid = make_hybrid(**head, backend=backend)
    settings = make_settings(hybrid, p_error, rounding)
    passages = calibration_passages(calibration)
    with step("calibrating"):
        hybrid = hybrid.calibrate(passages, seq_len)
    hybrid = compiled(hybrid, passages, seq_len, settings, backend, cache)
    result = compile_result(hybrid)
    if out is not None:
        from jaxgpt2.serving.models import write_bundles

        result["bundle"] = write_bundles(hybrid, out, result)
        note(f"wrote {out / 'server'}, with the weights of head {result['head']}, and {out / 'client'}, without them")
    emit(as_json, result, cost_lines(result, describe(hybrid)))


def compile_result(hybrid: Any) -> dict[str, Any]:
    """The cost of all compiled modules together, and each one's own report."""
    from fhe import Report

    reports = [circuit.report for circuit in hybrid.circuits.values()]
    cost = total_cost(hybrid.costs(hybrid.seq_len))
    if all(isinstance(report, Report) for report in reports):
        own = {
            "complexity": sum(report.complexity for report in reports),
            "p_error": max(report.p_error for report in reports),
            "rounding": reports[0].rounding,
        }
    else:
        facts = [report.to_json() for report in reports]
        own = {
            name: max(each[name] for each in facts)
            for name in ("security_bits", "ring", "modulus_bits", "scale_bits", "levels", "rotation_keys")
        }
    return {
        **heads_of(hybrid),
        "seq_len": hybrid.seq_len,
        "backend": reports[0].backend,
        **cost.to_json(),
        **own,
        "cost": cost.describe(),
        "machine": cost.machine,
        "noise": reports[0].noise,
        "evaluation_key_bytes": sum(report.evaluation_key_bytes for report in reports),
        "evaluation_key_source": reports[0].evaluation_key_source,
        "compile_seconds": sum(report.compile_seconds for report in reports),
        "versions": reports[0].versions,
        "heads": {str(module): circuit.report.to_json() for module, circuit in hybrid.circuits.items()},
    }


def cost_lines(cost: dict[str, Any], configs: str) -> list[str]:
    """A cost report for people."""
    megabyte = 1e6
    lines = [f"head {cost['head']}, {configs}, {cost['seq_len']} tokens, backend {cost['backend']}", ""]
    if "pbs_by_stage" in cost:
        widths = sorted({int(bits) for counts in cost["pbs_by_stage"].values() for bits in counts})
        lines += stage_lines("lookups (PBS) by bits", cost["pbs_by_stage"], list(map(str, widths)))
        rounding = cost["rounding"] + (f" ({cost['noise']})" if cost["noise"] else "")
        facts = [
            f"complexity            {cost['complexity']:.3g}",
            f"error per lookup      {cost['p_error']:g}",
            f"rounding              {rounding}",
        ]
    else:
        kinds = sorted({kind for counts in cost["stages"].values() for kind in counts})
        lines += stage_lines("operations", cost["stages"], kinds)
        facts = [
            f"parameters            ring {cost['ring']}, {cost['levels']} levels of {cost['scale_bits']} bits, "
            f"{cost['modulus_bits']} bits of moduli, {cost['security_bits']}-bit security",
            f"noise                 {cost['noise']}",
        ]
    kept = {"compiler": " in memory; sent compressed", "estimated": ", about"}.get(cost["evaluation_key_source"], "")
    return [
        *lines,
        "",
        *facts,
        f"evaluation keys       {cost['evaluation_key_bytes'] / megabyte:,.1f} MB{kept}",
        f"ciphertexts           {cost['input_ciphertext_bytes'] / megabyte:,.2f} MB in, "
        f"{cost['output_ciphertext_bytes'] / megabyte:,.2f} MB out",
        f"compiled in           {seconds(cost['compile_seconds'])}",
        f"a run takes about     {seconds(cost['estimated_run_seconds'])} ({cost['machine']})",
    ]


def stage_lines(title: str, stages: Mapping[str, Mapping[str, int]], columns: Sequence[str]) -> list[str]:
    """A table of counts: a row for every stage, a column for everything counted, and sums."""
    sizes = [max(8, len(name) + 2) for name in columns]

    def row(name: str, counts: Mapping[str, int]) -> str:
        cells = "".join(f"{counts.get(column, 0) or '':>{size}}" for column, size in zip(columns, sizes, strict=True))
        return f"{name:24}{cells}{sum(counts.values()):>9,}"

    total = {column: sum(counts.get(column, 0) for counts in stages.values()) for column in columns}
    head = "".join(f"{name:>{size}}" for name, size in zip(columns, sizes, strict=True))
    return [f"{title:24}{head}{'all':>9}", *(row(stage, counts) for stage, counts in stages.items()), row("all", total)]


@main.command()
@json_option
def info(as_json: bool) -> None:
    """Versions, devices, models, attention methods and backends."""
    import jax

    import fhe
    from jaxgpt2 import methods

    packages = (
        "jaxgpt2",
        "jax",
        "flax",
        "numpy",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "concrete-python",
        "tenseal",
    )
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    backends: dict[str, str] = {}
    for name in fhe.backends():
        try:
            backends[name] = fhe.get_backend(name).version()
        except fhe.BackendUnavailable as error:
            backends[name] = f"unavailable: {error}"
    result = {
        "versions": versions,
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "models": ["tiny"],
        "attention": list(methods.names()),
        "backends": backends,
    }
    lines = [
        *(f"{name:18}{version or 'not installed'}" for name, version in versions.items()),
        f"{'devices':18}{', '.join(result['devices'])}",
        f"{'models':18}tiny (bundled), any GPT-2 directory, any GPT-2 on the Hugging Face Hub by its id",
        f"{'attention':18}{', '.join(result['attention'])}",
        f"{'backends':18}{'; '.join(f'{name} ({state})' for name, state in backends.items())}",
    ]
    emit(as_json, result, lines)


if __name__ == "__main__":
    main()
