"""A hostile client: requests that nobody's client would send, to both servers, with figures of what became of them.

    python scripts/attack_server.py --inputs 10000

Requests to a server of circuits are made from its own description (schemathesis): right and wrong ones, in JSON and in
MessagePack, with tokens and without, for sessions and keys that are there and that are not; every answer must be as
described. Then batches with real ciphertexts are changed byte by byte. A server of linear layers is sent bodies and
paths near what it takes. Nothing may be answered with a status of 500 or more, and afterwards both must do their work.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import hypothesis
import msgpack
import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from fhe import rlwe
from jaxgpt2.serving.linear_server import MOST_ROWS
from jaxgpt2.serving.protocol import MSGPACK

# What an answer must be like. A right request may still be refused: its session is not there, its bytes are no keys.
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.allow_header_conformance,
]

TOKEN = "token-of-mallory"


@dataclass
class Tally:
    """What became of requests: how many had which status."""

    statuses: Counter[int] = field(default_factory=Counter)

    def note(self, status: int) -> None:
        self.statuses[status] += 1
        assert status < 500 or status == 503, status

    @property
    def inputs(self) -> int:
        return self.statuses.total()

    def __str__(self) -> str:
        return ", ".join(f"{count:,} x {status}" for status, count in sorted(self.statuses.items()))


def settings(inputs: int, seed: int | None) -> hypothesis.settings:
    """seed: None tries the same inputs every time."""
    return hypothesis.settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        phases=[hypothesis.Phase.generate],
    )


def run(test: Callable[..., None], inputs: int, seed: int | None, **given: Any) -> None:
    wrapped = settings(inputs, seed)(hypothesis.given(**given)(test))
    (wrapped if seed is None else hypothesis.seed(seed)(wrapped))()


# --- by the description ---------------------------------------------------------------------------


@schemathesis.serializer(MSGPACK)
def _pack(_: Any, value: Any) -> bytes:
    if isinstance(value, dict) and isinstance(uploads := value.get("uploads"), list):
        # JSON's schemas have no bytes.
        value = {**value, "uploads": [item.encode() if isinstance(item, str) else item for item in uploads]}
    try:
        data = msgpack.packb(value, default=str)
    except (ValueError, OverflowError, UnicodeEncodeError):  # a number or text that MessagePack has not
        data = msgpack.packb(repr(value), unicode_errors="surrogatepass")
    assert data is not None
    return data


@schemathesis.deserializer(MSGPACK)
def _unpack(_: Any, response: Any) -> Any:
    return {"results": ["" for _ in msgpack.unpackb(response.content)["results"]]}


def by_description(url: str, known: dict[str, str], inputs: int, seed: int | None = None) -> Tally:
    """known: values of path parameters that are there, taken now and then."""
    description = requests.get(f"{url}/openapi.json", timeout=10).json()
    schema = schemathesis.openapi.from_dict(description)
    operations = [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]
    tally = Tally()
    with requests.Session() as session:

        def attack(case: Any, token: str | None) -> None:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            response = case.call(base_url=url, session=session, headers=headers, timeout=60)
            tally.note(response.status_code)
            case.validate_response(response, checks=CHECKS)

        for operation in operations:
            names = [each.name for each in operation.path_parameters]
            strategies = [operation.as_strategy(mode) for mode in GenerationMode]
            if names and all(name in known for name in names):
                there = {name: known[name] for name in names}
                strategies += [
                    operation.as_strategy(mode, path_parameters=there) for mode in schemathesis.GenerationMode
                ]
            tokens = st.sampled_from([TOKEN] * 9 + [None, "another"])
            run(attack, max(1, inputs // len(operations)), seed, case=st.one_of(strategies), token=tokens)
        for path in description["paths"]:
            for method in ("PATCH", "TRACE", "HEAD", "OPTIONS", "DELETE", "POST"):
                if method.lower() not in description["paths"][path]:
                    response = session.request(method, url + path)
                    tally.note(response.status_code)
                    allowed = {each.upper() for each in description["paths"][path]}
                    assert response.status_code == 405 and set(response.headers["Allow"].split(", ")) == allowed
    return tally


# --- changed batches ------------------------------------------------------------------------------


def by_changes(client: httpx2.Client, path: str, batch: dict[str, Any], inputs: int, seed: int | None = None) -> Tally:
    """A batch that is right, with some of its bytes changed, removed, repeated or put elsewhere."""
    tally = Tally()

    def attack(data: st.DataObject) -> None:
        content = bytearray(msgpack.packb({**batch, "request": secrets.token_hex(16)}) or b"")
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content)))
            end = min(len(content), at + data.draw(st.integers(0, 40)))
            match data.draw(st.integers(0, 3)):
                case 0:
                    content[at:end] = data.draw(st.binary(max_size=40))
                case 1:
                    del content[at:end]
                case 2:
                    content[at:at] = content[at:end] * data.draw(st.integers(1, 1000))
                case 3:
                    other = data.draw(st.integers(0, len(content)))
                    content[other:other] = content[at:end]
        answer = client.post(path, content=bytes(content))
        tally.note(answer.status_code)
        assert answer.is_success or set(answer.json()) == {"code", "detail"}

    run(attack, inputs, seed, data=st.data())
    return tally


# --- linear layers --------------------------------------------------------------------------------


def by_sizes(client: httpx2.Client, inputs: int, count: int, seed: int | None = None) -> Tally:
    """Requests to a server of linear layers whose matrix 0 has so many inputs; bodies of sizes near what it takes."""
    tally, feature = Tally(), rlwe.Parameters().feature_bytes
    sizes = st.sampled_from([0, 4 * inputs, 4 * inputs * MOST_ROWS, feature * inputs]).flatmap(
        lambda size: st.sampled_from([size]) | st.integers(max(0, size - 5), size + 5)
    )
    numbers = st.sampled_from(["0"]) | st.integers(-2, 10**9).map(str) | st.text(max_size=5).map(_quoted)

    def attack(method: str, number: str, phase: str, size: int, fill: bytes) -> None:
        content = fill * size
        answer = client.request(method, f"/matrices/{number}/{phase}", content=content)
        tally.note(answer.status_code)
        assert answer.is_success or method == "HEAD" or set(answer.json()) == {"code", "detail"}

    run(
        attack, count, seed, method=st.sampled_from(["POST"] * 8 + ["GET", "PUT", "HEAD", "DELETE"]), number=numbers,
        phase=st.sampled_from(["online", "ahead", "online", "ahead", "specification", ""]), size=sizes,
        fill=st.binary(min_size=1, max_size=1),
    )  # fmt: skip
    return tally


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass")) or "%20"


# --- the command ----------------------------------------------------------------------------------


class Target:
    """A server of circuits with a session of somebody, and a batch that it takes."""

    def __init__(self, server: Any, circuit: Any):
        self.server, self.circuit, self.keys = server, circuit, circuit.make_keys()
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.client = httpx2.Client(base_url=server.url, headers=headers, timeout=60)
        evaluation = self.keys.evaluation
        self.digest = hashlib.sha256(evaluation).hexdigest()
        span = {"Content-Range": f"bytes 0-{len(evaluation) - 1}/{len(evaluation)}"}
        self.client.put(f"/keys/{self.digest}", content=evaluation, headers=span)
        self.open()

    def open(self) -> None:
        answer = self.client.post("/sessions", json={"circuit": self.circuit.id, "keys": self.digest})
        self.session = answer.json()["session"]

    @property
    def path(self) -> str:
        return f"/sessions/{self.session}/batches"

    def batch(self) -> dict[str, Any]:
        row = np.array([[1, -2, 3, 0]])
        return {
            "request": secrets.token_hex(16),
            "calls": [
                {"id": 0, "function": "project", "inputs": [0]},
                {"id": 1, "function": "attend", "inputs": [{"call": 0, "output": 0}, {"call": 0, "output": 1}]},
            ],
            "uploads": self.circuit.encrypt(self.keys, "project", row),
            "results": [{"call": 1, "output": 0}],
            "forget": [],
        }

    def check(self) -> None:
        """It still does its work, and nothing in its log says that it failed."""
        self.open()
        answer = self.client.post(self.path, content=msgpack.packb(self.batch()))
        (found,) = self.circuit.decrypt(self.keys, "attend", msgpack.unpackb(answer.content)["results"])
        assert found.shape == (1, 4)
        assert not [event for event in self.server.events() if event.get("level") == "error"]


@contextmanager
def targets(directory: Path):
    """A server of circuits, and one of linear layers, as (target, client). The tests have both."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from jaxgpt2.serving import bundle as bundles
    from linears import random_matrices
    from served import running, small_circuit

    circuit = small_circuit()
    bundles.write(directory / "circuits", "server", "b" * 64, {"0.1": circuit})
    tokens = directory / "tokens"
    tokens.write_text(f"mallory {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    with (
        running(directory / "circuits", directory / "state", "--tokens", tokens) as first,
        running(random_matrices(directory / "linear"), directory / "other", "--tokens", tokens) as second,
        httpx2.Client(base_url=second.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client,
    ):
        yield Target(first, circuit), client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="requests, about")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    each = options.inputs // 3
    with tempfile.TemporaryDirectory() as directory, targets(Path(directory)) as (target, client):
        known = {"digest": target.digest, "identity": target.session, "batch": "0" * 32}
        print(
            f"{date.today()}, seed {options.seed}\n\n| attack | inputs | seconds | answers |\n| --- | --- | --- | --- |"
        )
        for name, attack in [
            ("made from the description", lambda: by_description(target.server.url, known, each, options.seed)),
            (
                "batches with changed bytes",
                lambda: by_changes(target.client, target.path, target.batch(), each, options.seed),
            ),
            ("to linear layers", lambda: by_sizes(client, 32, each, options.seed)),
        ]:
            started = time.monotonic()
            tally = attack()
            print(f"| {name} | {tally.inputs:,} | {time.monotonic() - started:.0f} | {tally} |", flush=True)
            target.check()
        assert client.get("/specification").is_success
    print("\nBoth servers work as before.")


if __name__ == "__main__":
    main()
