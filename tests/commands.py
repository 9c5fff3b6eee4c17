"""A grammar of command lines, good ones and bad ones, that hypothesis draws from: shared by a test and by
`scripts/attack_cli.py`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner
from hypothesis import strategies as st

from jaxgpt2.cli import main
from jaxgpt2.cli.app import COMMANDS, Commands

# What an option may get, whatever it wants: text that a shell can hand on, so without a zero byte.
NASTY = [
    "", " ", "-1", "0", "1", "2", "3", "4", "99", "1e-300", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30,
    "9" * 5000, "0x10", "1_0", "\u0663", "\u00b2", "\udcff", "\u202e", "\x1b[2J", "a\nb", "tiny", "../..", "/",
    "/dev/null", "/dev/null/x", "/proc/self/mem", "/proc/nowhere", "~", "a" * 300, "all", "none", "0.0", "0.attn",
    "0.0,0.0", "9.9", "1.1,0.2", ",", "linear", "2-4,8", "4-2", "1-99999999999", "1-1000", "score_rank=8",
    "score_rank=-1", "score_rank=99999999999999999999", "value_rank=0", "=", "a=b", "http://127.0.0.1:1",
    "https://127.0.0.1:1", "http://[::1", "http://h:99999", "file:///etc/passwd", "http://a..b", "tcp://127.0.0.1:1",
    "clear", "ckks", "concrete", "rlwe", "softmax", "lowrank", "polynomial", "exact", "approximate", "none", "float",
    "quantized", "simulate", "encrypted", "1,5,10", "1e-5,0.1", "model.safetensors", "127.0.0.1", "::1", "0.0.0.0",
]  # fmt: skip

# Files of a `Place` that may be given for any path, and that may not be changed.
FILES = [
    "file", "binary", "deep", "zeros", "empty", "model", "calibration", "eval", "configs", "server", "client",
    "linear/server", "linear/client", "nowhere", "file/below", "new",
]  # fmt: skip

# What takes long, or listens, in a run that succeeds: given as often as others, and never to the end.
_QUICK = {"sweep": ["--limit", "1"], "tune": ["--limit", "1"], "eval": ["--limit", "1"]}


@dataclass(frozen=True)
class Outcome:
    """status: exit status; said: standard error; crash: an exception that was no exit."""

    status: int
    said: str
    crash: BaseException | None


def options_of(command: str) -> list[click.Parameter]:
    found = Commands().get_command(click.Context(main), command)
    assert found is not None
    return list(found.params)


def values(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """For a parameter: often of its type, often not."""
    kind, own = parameter.type, st.sampled_from(NASTY)
    if isinstance(kind, click.Choice):
        return st.sampled_from([*map(str, kind.choices)]) | own
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return st.integers(-2, 20).map(str) | own
    if isinstance(kind, click.Path):
        return st.sampled_from(FILES) | own
    return own | st.text(st.characters(exclude_characters="\0"), max_size=12)


@st.composite
def lines(draw: Any, commands: Sequence[str] = tuple(COMMANDS)) -> list[str]:
    """A command with some of its options, and now and then with what it does not have."""
    command = draw(st.sampled_from(commands))
    parameters = options_of(command)
    line = [command, *_QUICK.get(command, [])]
    for argument in (each for each in parameters if isinstance(each, click.Argument)):
        if draw(st.integers(0, 9)):
            line.append(draw(values(argument)))
    known = [each for each in parameters if isinstance(each, click.Option)]
    some = st.lists(st.sampled_from(known), max_size=6, unique_by=lambda each: each.name) if known else st.just([])
    for option in draw(some):
        line.append(option.opts[0])
        if not option.is_flag:
            line.append(draw(values(option)))
    if not draw(st.integers(0, 19)):
        line.append(draw(st.sampled_from(NASTY)))
    return line


def run(line: Sequence[str]) -> Outcome:
    found = CliRunner().invoke(main, list(line))
    crash = found.exception if not isinstance(found.exception, SystemExit) else None
    return Outcome(found.exit_code, found.stderr, crash)


def problem(outcome: Outcome) -> str | None:
    """What is wrong with how a command ended, if anything."""
    if outcome.crash is not None:
        return f"traceback: {type(outcome.crash).__name__}: {str(outcome.crash)[:200]}"
    if outcome.status not in (0, 2):
        return f"exit status {outcome.status}"
    if outcome.status == 2:
        told = [line for line in outcome.said.splitlines() if line.startswith(("jaxgpt2: ", "Error: "))]
        if len(told) != 1 or len(told[0]) > 2000:
            return f"not one line: {outcome.said[:200]!r}"
        if not told[0].isprintable():
            return f"a line that moves the cursor: {told[0]!r:.200}"
    return None


def make_place(directory: Path, model: Path) -> None:
    """Files in the way, files that are none, and bundles; the current directory of commands."""
    import served
    from jaxgpt2.linear import LinearGPT2
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.serving import bundle as bundles
    from jaxgpt2.serving.linear_bundle import write_bundles
    from linears import PASSAGES

    (directory / "file").write_text("text\n")
    (directory / "binary").write_bytes(bytes(range(256)))
    (directory / "zeros").write_text("the cat\nsat \0 on\n")
    (directory / "deep").write_text("[" * 100_000 + "]" * 100_000)
    (directory / "configs").write_text('{"modules": {"0.0": {"attention": "softmax", "bits": {}}}}')
    (directory / "empty").mkdir()
    (directory / "model").symlink_to(model)
    (directory / "bundled").mkdir()
    for place in (directory, directory / "bundled"):
        ending = ".txt" if place.name == "bundled" else ""
        (place / f"calibration{ending}").write_text("\n".join(PASSAGES) + "\n")
        (place / f"eval{ending}").write_text("the dog\nit ran\na\n")
    for kind in ("server", "client"):
        bundles.write(directory / kind, kind, "b" * 64, {"0.1": served.small_circuit()})
    write_bundles(LinearGPT2.quantize(GPT2.from_pretrained(model), PASSAGES), directory / "linear", {})


@contextlib.contextmanager
def contained(directory: Path, model: Path) -> Iterator[None]:
    """Commands in their own user's directories. Models are loaded once, there is no Hub, nothing listens, and no engine
    compiles anything."""
    from jaxgpt2.errors import InputError
    from jaxgpt2.models.gpt2.pretrained import GPT2

    def no(*_: Any, **__: Any) -> None:
        raise InputError("not in this test")

    loaded = functools.lru_cache(maxsize=4)(GPT2.from_pretrained)
    homes = {f"XDG_{kind}_HOME": str(directory / "home" / kind.lower()) for kind in ("CACHE", "DATA", "STATE")}
    with contextlib.ExitStack() as stack:
        for target, value in [
            ("jaxgpt2.models.gpt2.pretrained.GPT2.from_pretrained", loaded),
            ("jaxgpt2.evaluation.TINY", directory / "bundled"),  # before the one that it is imported from
            ("weights.checkpoint.TINY", model),
            ("weights.checkpoint._download", no),
            ("jaxgpt2.serving.server.serve", no),
            ("jaxgpt2.serving.linear_server.serve_linear", no),
            ("jaxgpt2.serving.page.serve_page", no),
            ("jaxgpt2.executors.cluster.connect", no),
            ("jaxgpt2.sweeps.cluster.run", no),
            ("jaxgpt2.serving.remote.FIRST_PATIENCE", 0.2),
            ("jaxgpt2.encrypted.EncryptedGPT2.compile_on", no),
            ("jaxgpt2.serving.masked.make_products", no),
        ]:
            stack.enter_context(mock.patch(target, value))
        # Undoes these alone: `mock.patch.dict` would also take away what a library that is imported meanwhile has set.
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, place in {**homes, "COLUMNS": "200"}.items():
            environment.setenv(name, place)
        yield
