"""What people get wrong: one clear line and exit status 2, before anything is computed or written."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import served
from jaxgpt2.cli import main
from jaxgpt2.serving import bundle as bundles

DEEP = "[" * 100_000 + "]" * 100_000


def jaxgpt2(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that a command is refused with."""
    found = jaxgpt2(*arguments)
    assert found.exit_code == 2, (found.exit_code, found.output, found.exception)
    assert not found.stdout
    (line,) = found.stderr.splitlines()
    assert line.startswith("jaxgpt2: ") and len(line) < 1000
    return line


@pytest.fixture(scope="module")
def place(small_readonly: Path, tmp_path_factory) -> Path:
    """Files that are in the way, and others that are not what they should be."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "file").write_text("text\n")
    (directory / "binary").write_bytes(bytes(range(256)))
    (directory / "zeros").write_text("the cat\nsat \0 on\n")
    (directory / "deep").write_text(DEEP)
    (directory / "eval").write_text("the dog\nit ran\na\n")
    (directory / "empty").mkdir()
    (directory / "model").symlink_to(small_readonly)
    (directory / "calibration").write_text("the cat\nsat on\na mat\n" * 8)
    for kind in ("server", "client"):
        bundles.write(directory / kind, kind, "b" * 64, {"0.1": served.small_circuit()})
    return directory


@pytest.fixture
def uncomputed(monkeypatch) -> None:
    """Calibration and compilation must not be reached."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("jaxgpt2.encrypted.EncryptedGPT2.calibrate", reached)
    monkeypatch.setattr("jaxgpt2.encrypted.EncryptedGPT2.compile", reached)
    monkeypatch.setattr("jaxgpt2.models.gpt2.pretrained.GPT2.from_pretrained", reached)
    monkeypatch.setattr("jaxgpt2.serving.server.start_workers", reached)


REMOTE = ["--server", "http://127.0.0.1:1", "--client", "client"]
LINEAR = ["--encrypt", "linear"]
BELOW_A_FILE = [
    ["compile", "--out"], ["compile", *LINEAR, "--out"], ["compile", "--cache"],
    ["eval", "--mode", "simulate", "--cache"], ["generate", "a", "--mode", "simulate", "--cache"],
    ["generate", "a", *REMOTE, "--keys"], ["generate", "a", *REMOTE, "--masks"], ["prepare", *REMOTE, "--masks"],
    ["page", *REMOTE, "--masks"],
    ["sweep", "--out"], ["sweep", *LINEAR, "--out"], ["serve", "server", "--state"],
]  # fmt: skip


@pytest.mark.usefixtures("uncomputed")
@pytest.mark.parametrize("arguments", BELOW_A_FILE, ids=lambda arguments: " ".join(arguments))
def test_directories_that_cannot_be_made(place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert "file/a/b cannot be made" in refused(*arguments, "file/a/b")
    assert "file is a file" in refused(*arguments, "file")
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.R_OK)  # root may write anywhere
    assert "is somebody else's, or read-only" in refused(*arguments, "new")
    assert sorted(place.rglob("*")) == before


@pytest.mark.usefixtures("uncomputed")
@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (["compile"], "XDG_CACHE_HOME"),
        (["eval", "--mode", "simulate"], "XDG_CACHE_HOME"),
        (["generate", "a", "--mode", "encrypted"], "XDG_CACHE_HOME"),
        (["serve", "server"], "XDG_STATE_HOME"),
    ],
)
def test_the_users_own_directories(place, monkeypatch, arguments, variable):
    monkeypatch.chdir(place)
    monkeypatch.setenv(variable, str(place / "file"))
    assert f"cannot be made: {place / 'file'} is a file" in refused(*arguments)


@pytest.mark.usefixtures("uncomputed")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tune", "--encrypt", "0.0", "--out", "empty"], "empty is a directory: give a file"),
        (["tune", "--encrypt", "0.0", "--out", "nowhere/x"], "there is no directory"),
        (["tune", "--encrypt", "0.0", "--out", "file/x"], "there is no directory"),
        (["token", "me", "nowhere/tokens"], "there is no directory"),
        (["token", "me", "file/tokens"], "there is no directory"),
        (["token", "me", "empty"], "empty is a directory"),
        (["token", "me", "binary"], "binary is no file of tokens"),
        (["token", "me", "file"], "line 1: wanted NAME"),
        (["serve", "server", "--tokens", "binary"], "binary cannot be read"),
        (["serve", "server", "--tokens", "nowhere"], "nowhere cannot be read"),
        (["generate", "a", "--seed", "-1"], "a seed must be 0 or more, got -1"),
        (["generate", "a", *LINEAR, "--seed", "-1"], "a seed must be 0 or more, got -1"),
        (["tune", "--encrypt", ""], "cannot read module ''"),
        (["sweep", "--out", "new", "--encrypt", ""], "a sweep takes linear"),
        (["sweep", "--out", "new", "--heads", ""], "--heads '' cannot be read"),
        (["sweep", "--out", "new", "--layers", ""], "--layers '' cannot be read"),
        (["tune", "--encrypt", "0.0", "--sweep", "deep"], "deep holds no sweep"),
        (["sweep", "--out", "new", "--bits", "2-10000000000"], "names more than 1,000,000 numbers"),
        (["sweep", "--out", "new", "--bits", "9" * 5000], "cannot be read: wanted numbers and ranges"),
        (["sweep", "--out", "new", "--bits", "\u0662"], "cannot be read: wanted numbers and ranges"),
        (["sweep", "--out", "new", "--set", "score_rank=1-9999999999"], "names more than 1,000,000 numbers"),
        (["sweep", "--out", "new", "--set", "score_rank=1-1000", "--set", "value_rank=1-1000"], "the grid has up to"),
        (["sweep", "--out", "new", "--weight-bits", "1-2000", "--input-bits", "1-2000"], "more than 1,000,000 comb"),
        (["sweep", "--out", "new", *LINEAR, "--weight-bits", "2-9999999999"], "names more than 1,000,000 numbers"),
        (["eval", "--top-k", "\u00b2"], "--top-k '\u00b2' cannot be read"),
        (["eval", "--top-k", "9" * 5000], "cannot be read: wanted numbers and ranges"),
        (["eval", "--text", "zeros"], "zeros, line 2: it holds a zero byte"),
        (["eval", "--text", "binary"], "binary is not UTF-8 text"),
        (["compile", "--backend", "ckks", "--bits", "99"], "--bits has no effect on 'polynomial'"),
        (["compile", "--backend", "ckks", "--input-bits", "4"], "--input-bits has no effect on 'polynomial'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(place, monkeypatch, arguments, part):
    monkeypatch.chdir(place)
    monkeypatch.setattr("jaxgpt2.models.gpt2.pretrained.read_config", lambda _: _small_config())
    assert part in refused(*arguments)
    assert not (place / "new").exists()
    assert not list((place / "empty").iterdir())


def _small_config() -> Any:
    from jaxgpt2.models.gpt2.config import GPT2Config

    return GPT2Config(n_layer=2, n_head=4, n_embd=32)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--encrypt", ""], "cannot read module ''"),
        (["--encrypt", ","], "cannot read module ''"),
        (["--configs", "deep"], "deep is no file of configurations"),
        (["--p-error", "1e-300"], "p_error must lie between 2**-128 and 1"),
        (["--p-error", "nan"], "p_error must lie between 2**-128 and 1"),
        (["--backend", "ckks", "--p-error", "0.1"], "--p-error has no effect on 'polynomial'"),
        (["--attention", "polynomial", "--rounding", "exact"], "--rounding has no effect on 'polynomial'"),
        (["--calibration", "zeros"], "zeros, line 2: it holds a zero byte"),
    ],
)
def test_options_of_encryption(place, monkeypatch, arguments, part):
    monkeypatch.chdir(place)
    assert part in refused("compile", "--model", "model", *arguments)


def test_nothing_to_resume(place, monkeypatch):
    monkeypatch.chdir(place)
    common = ["--model", "model", "--text", "eval", "--calibration", "calibration", "--resume", "--out", "empty"]
    for more in (["--bits", 4, "--seq-len", 4], ["--encrypt", "linear"]):
        assert "empty holds no sweep to go on with: leave --resume out" in refused("sweep", *common, *more)
    assert not list((place / "empty").iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "//", "http:", "http://", "https:///x", "http://[::1", "http://[x]", "http://h:port", "http://h:0",
        "http://h:99999", "http://h:-1", "http://a..b", "http://" + "a" * 64, "http://h?q", "http://h#f",
        "http://me:secret@h", "ftp://h", "file:///etc/passwd", "http://a b", "http://h\n", "http://\u2603.\u2603..",
        "http://\udcff", "http://h\x7f",
    ],
)  # fmt: skip
def test_urls_that_are_none(place, url):
    line = refused("generate", "a", "--insecure", "--server", url, "--client", place / "client")
    assert "is no server: wanted https://HOST[:PORT]" in line


@pytest.mark.parametrize("token", ["\u00fc", "a b", "a\nb", "", " ", "\x7f", "\udcff", "x" * 2000])
def test_tokens_that_are_none(place, token):
    line = refused("generate", "a", "--server", "http://127.0.0.1:1", "--client", place / "client", "--token", token)
    assert "the token is none: wanted printable ASCII" in line
    assert "x" * 20 not in line  # a secret, all the same


def test_a_bundle_that_encrypts_nothing(place):
    remote = ["generate", "a", "--server", "http://127.0.0.1:1", "--client", place / "client"]
    assert "backend 'clear', which encrypts nothing: the server would read your text" in refused(*remote)


def test_a_port_that_is_taken_leaves_nothing(place, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused("serve", place / "server", "--port", port, "--state", tmp_path / "state")
    assert f"cannot listen on 127.0.0.1, port {port}" in line
    assert not (tmp_path / "state").exists()
    line = refused("serve", place / "server", "--anybody", "--host", "a..b", "--state", tmp_path / "state")
    assert "cannot listen on a..b" in line
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("rows", [b"junk\n", b"5\n", b"{}\n", b"[]\n", b"\xff\n", DEEP.encode() + b"\n"])
def test_rows_of_a_sweep_that_are_none(tmp_path, rows):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_bytes(rows)
    assert "line 1: this is no row of a sweep" in refused("tune", "--encrypt", "0.0", "--sweep", tmp_path)


@pytest.mark.parametrize(
    "row", [{}, {"layer": "x", "head": []}, {"layer": 0, "head": 0, "attention": "softmax", "recovered_kl": "x"}]
)
def test_rows_of_something_else(tmp_path, row):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"key": "0.0 a", **row}) + "\n")
    assert "is no sweep of heads: '0.0 a' is another row" in refused("tune", "--encrypt", "0.0", "--sweep", tmp_path)


def test_a_full_disk_is_one_line(place, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "where")

    monkeypatch.setattr("jaxgpt2.models.gpt2.pretrained.GPT2.from_pretrained", full)
    assert refused("generate", "a") == "jaxgpt2: no space left on device: where"
