"""Two programs, two secrets: real processes, real keys, real ciphertexts, small heads."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import re
import secrets
import signal
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import fhe
import helpers
from fhe import envelope
from jaxgpt2.cli import main
from jaxgpt2.encrypted import EncryptedGPT2, head_weights
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import parse_modules
from jaxgpt2.serving.bundle import Bundle, BundleError
from jaxgpt2.serving.client import RemoteGPT2
from jaxgpt2.serving.models import read_client
from served import Running, certificates, running, tokens_file

pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")

CALIBRATION = ["ab", "cd", "th", "ea", "to", "of", "in", "we", "he", "it", "ox", "zz", "abcd", "that", "word"]
TOKENS = {name: f"token-of-{name}" for name in ("alice", "bob", "carol", "dave")}
PROMPT, NEW = "tq", 3
LENGTH = 9
HEADS = "1.2"
LOWRANK = ["--attention", "lowrank", "--bits", 2, "--input-bits", 2, "--weight-bits", 2, "--set", "score_rank=1",
           "--set", "value_rank=1", "--set", "training_steps=2", "--rounding", "exact", "--p-error", 1e-6]  # fmt: skip


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--json"]])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    helpers.random_checkpoint(directory, n_embd=8, n_head=4)
    (directory / "calibration.txt").write_text("\n".join(CALIBRATION) + "\n")
    return directory


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory) -> Path:
    """Both bundles, and the circuits in a cache from which the same text is made in one process."""
    directory = tmp_path_factory.mktemp("compiled")
    common = ["--model", model, "--calibration", model / "calibration.txt", "--encrypt", HEADS, *LOWRANK,
              "--cache", directory / "cache"]  # fmt: skip
    report = run("compile", *common, "--seq-len", LENGTH, "--out", directory / "out")
    assert json.loads((directory / "out" / "report.json").read_text()) == report
    return directory / "out"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return tokens_file(tmp_path_factory.mktemp("tokens"), TOKENS)


@pytest.fixture(scope="module")
def server(compiled, tokens, tmp_path_factory):
    with running(compiled / "server", tmp_path_factory.mktemp("server") / "state", "--tokens", tokens) as one:
        yield one


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Directories of secret keys, a client's each."""
    return tmp_path_factory.mktemp("keys")


def whole_model(model: Path, compiled: Path) -> EncryptedGPT2:
    """Client and server in one process: the model with the bundle's circuits."""
    client = read_client(Bundle.read(compiled / "client", "client"))
    circuits = {
        module: fhe.get_backend("concrete").load(compiled / "server" / "circuits" / str(module))
        for module in client.modules
    }
    return EncryptedGPT2(GPT2.from_pretrained(model), client.configs, client.quantized, circuits, client.seq_len)


@pytest.fixture(scope="module")
def wanted(model, compiled, keys) -> list[int]:
    """The text that one process makes on ciphertexts."""
    encrypted = whole_model(model, compiled)
    text = list(encrypted.generate(PROMPT, NEW, "encrypted", keys=encrypted.make_keys(keys / "alice")))
    assert text == list(encrypted.generate(PROMPT, NEW, "simulate"))
    return text


def drop_sessions(server: Running, **options: Any) -> int:
    """Ends the sessions that are open, as if they had expired; how many."""
    found = list((server.log.parent / "state" / "sessions").iterdir())
    with httpx2.Client(base_url=server.url, **options) as client:
        for path in found:
            assert client.delete(f"/sessions/{path.name}").status_code == 204
    return len(found)


def remote_command(server: Any, compiled: Path, keys: Path, name: str, new: int = NEW) -> list[object]:
    return ["generate", PROMPT, "--server", server.url, "--client", compiled / "client", "--token", TOKENS[name],
            "--keys", keys / name, "--max-new-tokens", new]  # fmt: skip


# --- bundles ------------------------------------------------------------------------------------


def occurs(needle: np.ndarray, files: dict[str, bytes]) -> list[str]:
    """Files that hold an array's numbers one after the other, in any type that they could have been stored in."""
    kinds: list[Any] = [np.float64, np.float32, np.float16]
    if needle.dtype.kind in "iu":
        kinds = [np.int8, np.int16, np.int32, np.int64]
    patterns = {needle.astype(kind).tobytes() for kind in kinds}
    patterns.add((needle.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())  # bfloat16
    return [name for name, data in files.items() if any(pattern in data for pattern in patterns)]


def test_the_client_bundle_lacks_the_protected_weights(model, compiled):
    """Not under any name, not as a slice, a column, a row or a transpose, not in float and not in integers."""
    gpt2 = GPT2.from_pretrained(model)
    files = {
        str(path.relative_to(compiled / "client")): path.read_bytes()
        for path in (compiled / "client").rglob("*") if path.is_file()
    }  # fmt: skip
    assert not [name for name in files if name.endswith((".bin", ".zip", ".mlir", ".pkl"))]
    arrays = {
        f"{name}:{key}": value for name in files if name.endswith(".safetensors")
        for key, value in load_file(compiled / "client" / name).items()
    }  # fmt: skip
    size = gpt2.config.head_dim

    def windows(length: int) -> Iterator[tuple[str, np.ndarray]]:
        """All runs of numbers of a length in every array, as it is and transposed, of unit length."""
        for name, array in arrays.items():
            for flat in (array.reshape(-1), array.T.reshape(-1)):
                if flat.size >= length:
                    runs = np.lib.stride_tricks.sliding_window_view(flat.astype(np.float64), length)
                    norms = np.linalg.norm(runs, axis=1)
                    yield name, runs[norms > 0] / norms[norms > 0, None]

    for module in parse_modules(HEADS, gpt2.config):
        secret = head_weights(gpt2, module.layer, module.head or 0)
        kept = head_weights(gpt2, module.layer, 0)
        stored = load_file(compiled / "client" / "model" / "model.safetensors")[
            f"transformer.h.{module.layer}.attn.c_attn.weight"
        ]
        for part, start in zip(("query", "key", "value"), range((module.head or 0) * size, 24, 8), strict=True):
            weight, bias = getattr(secret, part), getattr(secret, f"{part}_bias")
            assert not stored[:, start : start + size].any()
            assert np.array_equal(stored[:, start - (module.head or 0) * size :][:, :size], getattr(kept, part))
            for needle in (*weight, *weight.T, weight, weight.T, bias):
                assert not occurs(np.ascontiguousarray(needle), files)
            for column in weight.T:  # nor a multiple of a column
                for name, runs in windows(len(column)):
                    assert np.abs(runs @ (column / np.linalg.norm(column))).max() < 0.999, name
    # The search finds what is there: the same head's rows of the output projection, which the client needs.
    assert occurs(head_weights(gpt2, 1, 2).output[0], files) == ["model/model.safetensors"]
    # The circuit's integers are where they belong, and nowhere else.
    circuits = (compiled / "server").rglob("*.mlir")
    constants = [dense for path in circuits for dense in re.findall(r"dense<(\[\[.*?\]\])>", path.read_text())]
    matrices = [np.array(json.loads(dense)) for dense in constants]
    matrices = [matrix for matrix in matrices if matrix.ndim == 2 and len(matrix) == 8 and np.unique(matrix).size > 2]
    assert matrices
    for matrix in matrices:
        for needle in (matrix.ravel(), matrix.T.ravel(), *matrix.T):
            assert not occurs(needle, files)
            text = re.sub(r"\s", "", ",".join(map(str, needle.tolist())))
            assert not any(text.encode() in re.sub(rb"\s", b"", data) for data in files.values())


def test_bundles_say_what_they_are(compiled, tmp_path):
    client, server = Bundle.read(compiled / "client", "client"), Bundle.read(compiled / "server", "server")
    assert client.id == server.id
    assert [entry.id for entry in client.circuits] == [entry.id for entry in server.circuits]
    with pytest.raises(BundleError, match="is a server bundle, wanted the client's"):
        read_client(Bundle.read(compiled / "server", "client"))
    encrypted = read_client(client)
    assert encrypted.seq_len == LENGTH
    with pytest.raises(fhe.NoWeights, match="without its weights"):
        list(encrypted.generate(PROMPT, 1, "simulate"))


# --- text ---------------------------------------------------------------------------------------


def test_the_text_through_the_server_is_the_text_of_one_process(server, compiled, keys, wanted):
    shown = CliRunner().invoke(
        main, [str(part) for part in [*remote_command(server, compiled, keys, "alice"), "--json"]]
    )
    first = json.loads(shown.stdout)
    assert first["tokens"] == wanted
    assert re.search(r"MB of ciphertexts sent, .* MB received, in \d+ requests; evaluation keys sent, ", shown.stderr)
    assert first["mode"] == "server" and first["modules"] == HEADS
    assert first["keys"] > 1_000_000 and first["sent"] > 0 and first["received"] > 0
    paths = list((keys / "alice").glob("*.keys"))
    assert len(paths) == 1 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    assert stat.S_IMODE((keys / "alice").stat().st_mode) == 0o700
    again = run(*remote_command(server, compiled, keys, "alice"))
    assert again["tokens"] == wanted
    assert again["keys"] == 0  # nothing is made or sent twice
    # The specification, keys, keys again, a session and its end; then one round trip a token.
    assert again["requests"] == 5 + NEW
    assert not list((server.log.parent / "state" / "sessions").iterdir())


@pytest.mark.slow
def test_four_clients_at_once_each_get_their_own_text(server, compiled, keys, model):
    prompts = dict(zip(TOKENS, ("tq", "he", "ox", "ab"), strict=True))
    encrypted = whole_model(model, compiled)

    def generate(name: str) -> list[int]:
        with RemoteGPT2.connect(server.url, compiled / "client", keys / name, token=TOKENS[name]) as remote:
            return list(remote.generate(prompts[name], 2))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = dict(zip(prompts, pool.map(generate, prompts), strict=True))
    assert len(set(map(tuple, texts.values()))) > 1
    assert texts == {name: list(encrypted.generate(prompt, 2, "simulate")) for name, prompt in prompts.items()}


@pytest.mark.slow
def test_a_session_that_expires_does_not_end_the_text(server, compiled, keys, wanted):
    with RemoteGPT2.connect(server.url, compiled / "client", keys / "alice", token=TOKENS["alice"]) as remote:
        text = remote.generate(PROMPT, NEW)
        got = [next(text), next(text)]
        assert drop_sessions(server, headers={"Authorization": f"Bearer {TOKENS['alice']}"}) == 1
        assert got + list(text) == wanted
    assert drop_sessions(server) == 0


@pytest.mark.slow
def test_the_text_on_workers_of_a_cluster(compiled, keys, wanted, tmp_path):
    distributed = pytest.importorskip("distributed", reason="the cluster extra is not installed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        options = ["--workers", 0, "--scheduler", cluster.scheduler_address]
        with (
            running(compiled / "server", tmp_path / "state", *options) as server,
            RemoteGPT2.connect(server.url, compiled / "client", keys / "alice") as remote,
        ):
            assert not server.workers()
            assert list(remote.generate(PROMPT, NEW)) == wanted


def memory_of(pid: int) -> Iterator[bytes]:
    """What a process has in memory and may write to, in pieces that overlap."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, access, *_ = line.split()
        if not access.startswith("rw"):
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        with Path(f"/proc/{pid}/mem").open("rb", 0) as file:
            while start < end:
                try:
                    file.seek(start)
                    yield file.read(min(1 << 24, end - start))
                except (OSError, OverflowError):
                    break
                start += (1 << 24) - (1 << 12)


def secret_bits(keys: Any) -> bytes:
    """A stretch of the secret key as it is serialized: words of 64 bits, each 0 or 1."""
    data = keys.keys.serialize()
    for offset in range(8):
        words = np.frombuffer(data, np.uint64, (len(data) - offset) // 8, offset)
        ends = np.concatenate([[-1], np.flatnonzero(words > 1), [len(words)]])  # of runs of words that are 0 or 1
        ones = np.diff(np.concatenate([[0], np.cumsum(words == 1)])[ends[1:]], prepend=0)
        longest = int(ones.argmax())
        run = words[ends[longest] + 1 : ends[longest + 1]][1:257]
        if 64 < np.count_nonzero(run) < 192:
            return run.tobytes()
    raise AssertionError("found no secret key in its own file")


@pytest.mark.slow
def test_the_server_holds_no_secret_and_no_text(compiled, tmp_path):
    """Neither on its disk, nor in its memory or its workers', nor in its log; nor the client's token."""
    marker = "qzxjvk"  # so long that no ciphertext will hold it by chance
    with running(compiled / "server", tmp_path / "state", "--workers", 1) as server:
        with RemoteGPT2.connect(server.url, compiled / "client", tmp_path / "keys") as remote:
            inputs: list[np.ndarray] = []
            for module, circuit in remote.encrypted.circuits.items():
                original = circuit.encrypt

                def spy(own: Any, name: str, *x: np.ndarray, original: Any = original) -> list[bytes]:
                    inputs.extend(x)
                    return original(own, name, *x)

                circuit.encrypt = spy  # pyright: ignore[reportAttributeAccessIssue]
                assert remote.keys[module]
            assert len(list(remote.generate(marker, 1))) == 1
            secrets_held = [secret_bits(keys) for keys in remote.keys.values()]
        ends = inputs[0][0], inputs[-1][-1]  # of the text: every needle is looked for in gigabytes
        rows = [row.astype(kind).tobytes() for row in ends for kind in (np.int64, np.int32, np.float32)]
        needles = {"text": marker.encode(), **{f"key {n}": part for n, part in enumerate(secrets_held)}}
        needles |= {f"row {n}": row for n, row in enumerate(rows)}
        assert all(np.count_nonzero(row) > 3 for row in ends)
        own = b"".join(path.read_bytes() for path in (tmp_path / "keys").glob("*.keys"))
        assert all(part in own for part in secrets_held)  # the search would find them
        places = {str(path): path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
        places["log"] = server.log.read_bytes()
        found = [(name, place) for name, needle in needles.items() for place, data in places.items() if needle in data]
        pids = [server.process.pid, *server.workers()]
        assert len(pids) == 2
        pieces, planted = 0, False
        for pid in pids:
            for piece in memory_of(pid):
                pieces += 1
                planted = planted or b"evaluation keys" in piece
                found += [(name, pid) for name, needle in needles.items() if needle in piece]
        assert pieces > 10 and planted
        assert not found


# --- what breaks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_and_then_the_server_killed_in_the_middle_of_a_text(compiled, keys, wanted, tmp_path):
    with running(compiled / "server", tmp_path / "state", "--workers", 1) as server:
        port = httpx2.URL(server.url).port or 0
        with RemoteGPT2.connect(server.url, compiled / "client", keys / "alice") as remote:
            text = remote.generate(PROMPT, NEW)
            got = [next(text)]
            sent = remote.connection.traffic.keys
            (worker,) = server.workers()
            threading.Timer(0.05, os.kill, [worker, signal.SIGKILL]).start()
            got.append(next(text))
            server.process.kill()
            server.process.wait()
            with running(compiled / "server", tmp_path / "state", "--workers", 1, port=port):
                got += list(text)
            assert got == wanted
            assert remote.connection.traffic.keys == sent  # no upload is lost


# --- hostile bytes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_ciphertexts_and_keys_are_refused_or_harm_nobody_else(server, compiled, keys, wanted):
    """Rightly summed envelopes around damaged ciphertexts: natively read, so that workers may die of them."""
    with RemoteGPT2.connect(server.url, compiled / "client", keys / "bob", token=TOKENS["bob"]) as remote:
        module, circuit = next(iter(remote.encrypted.circuits.items()))
        own: Any = remote.keys[module]
        client = httpx2.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {TOKENS['bob']}"}, timeout=120
        )  # fmt: skip

        def session_for(evaluation: bytes) -> str:
            digest = remote.connection.upload(evaluation)
            opened = client.post("/sessions", json={"circuit": circuit.id, "keys": digest})
            return opened.json()["session"]

        numbers = itertools.count()  # a call's number is never used twice

        def send(session: str, array: bytes) -> httpx2.Response:
            calls = [{"id": next(numbers), "function": "project", "inputs": [0]}]
            content = {
                "request": secrets.token_hex(16), "calls": calls, "uploads": [array], "results": [],
            }  # fmt: skip
            response = client.post(f"/sessions/{session}/batches", content=bytes(msgpack.packb(content) or b""))
            assert response.is_success or response.json()["code"] in ("refused", "worker_died"), response.text
            return response

        rng = np.random.default_rng(0)
        (array,) = circuit.encrypt(own, "project", np.zeros((1, 8), np.int64))
        (inner,) = envelope.unpack(array, "input 0 of project", circuit.id, own.id).parts
        session, outcomes = session_for(own.evaluation), []
        assert send(session, array).is_success
        for attempt in range(30):
            damaged = bytearray(inner)
            if attempt % 3 == 0:
                damaged = damaged[: rng.integers(0, len(inner))]
            elif attempt % 3 == 1:
                damaged[rng.integers(0, min(len(inner), 200))] ^= 1 << rng.integers(0, 8)
            else:
                damaged[rng.integers(0, len(inner))] ^= 1 << rng.integers(0, 8)
            (sealed,) = circuit.signatures.pack_inputs("project", circuit.id, own.id, [bytes(damaged)])
            outcomes.append(send(session, sealed).status_code)
        assert outcomes.count(422) > 6
        assert send(session, array).is_success
        client.delete(f"/sessions/{session}")

        (inner,) = envelope.unpack(own.evaluation, "evaluation keys", circuit.id, own.id).parts
        for attempt in range(3):
            damaged = bytearray(inner)
            if attempt % 2:
                damaged = damaged[: rng.integers(0, len(inner))]
            else:
                damaged[rng.integers(0, 300)] ^= 1 << rng.integers(0, 8)
            session = session_for(envelope.pack("evaluation keys", circuit.id, own.id, [bytes(damaged)]))
            send(session, array)
            client.delete(f"/sessions/{session}")
        assert list(remote.generate(PROMPT, NEW)) == wanted


# --- the other engine ---------------------------------------------------------------------------


@pytest.mark.slow
def test_ckks_through_the_server(model, tmp_path):
    pytest.importorskip("tenseal", reason="the ckks extra is not installed")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([f"{a}{b}" for a in CALIBRATION for b in CALIBRATION]) + "\n")
    common = ["--model", model, "--calibration", texts, "--encrypt", "0.1", "--attention", "polynomial",
              "--backend", "ckks", "--cache", tmp_path / "cache"]  # fmt: skip
    run("compile", *common, "--seq-len", 4, "--out", tmp_path / "out")
    quantized = run("generate", PROMPT, *common[:-4], "--mode", "quantized", "--max-new-tokens", 2)
    client, files = tmp_path / "out" / "client", certificates(tmp_path)
    tls = ["--tls-cert", files / "server.pem", "--tls-key", files / "server.key",
           "--tls-client-ca", files / "authority.pem"]  # fmt: skip
    own, trusted = (files / "client.pem", files / "client.key"), files / "authority.pem"
    with running(tmp_path / "out" / "server", tmp_path / "state", "--workers", 1, *tls) as server:
        result = run("generate", PROMPT, "--server", server.url, "--client", client, "--keys", tmp_path / "keys",
                     "--max-new-tokens", 2, "--tls-ca", trusted, "--tls-cert", own[0], "--tls-key", own[1])  # fmt: skip
        assert result["tokens"] == quantized["tokens"]
        with RemoteGPT2.connect(server.url, client, tmp_path / "keys", authority=trusted, certificate=own) as remote:
            text = remote.generate(PROMPT, 2)
            got = [next(text)]
            context = ssl.create_default_context(cafile=trusted)
            context.load_cert_chain(*own)
            assert drop_sessions(server, verify=context) == 1
            assert got + list(text) == quantized["tokens"]
    assert not list(client.rglob("server.bin"))


# --- the command line ---------------------------------------------------------------------------


def test_bad_input_is_one_line(server, compiled, keys, tmp_path):
    client = compiled / "client"
    for arguments, message in [
        (["--server", server.url], "give --server and --client"),
        (["--client", client], "give --server and --client"),
        (["--server", server.url, "--client", tmp_path], "is no client bundle"),
        (["--server", server.url, "--client", compiled], f"give {client}"),
        (["--server", server.url, "--client", client, "--bits", 3], "--bits has no place beside --server"),
        (["--server", server.url, "--client", client, "--mode", "float"], "--mode has no place"),
        (["--server", server.url, "--client", client], "wants a bearer token that it knows (401 unauthorized)"),
        (["--server", "http://example.org", "--client", client], "is not encrypted"),
        ([*remote_command(server, compiled, keys, "alice", 12)[2:]], "these are made for 9"),
    ]:
        result = CliRunner().invoke(main, ["generate", PROMPT, *map(str, arguments)])
        assert result.exit_code == 2, result.output
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("jaxgpt2: ") and message in line, line
