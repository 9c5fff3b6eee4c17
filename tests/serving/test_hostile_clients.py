"""A short run of `scripts/attack_server.py`: always the same inputs. The long run is a command."""

import hashlib
from pathlib import Path
from typing import Any

import httpx2
import pytest

from attack_server import TOKEN, Target, by_changes, by_description, by_sizes
from jaxgpt2.serving import bundle as bundles
from linears import random_matrices
from served import running, small_circuit


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"mallory {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    return path


@pytest.fixture(scope="module")
def target(tokens, tmp_path_factory) -> Any:
    directory, circuit = tmp_path_factory.mktemp("circuits"), small_circuit()
    bundles.write(directory / "server", "server", "b" * 64, {"0.1": circuit})
    with running(directory / "server", directory / "state", "--tokens", tokens, "--workers", 1) as server:
        yield Target(server, circuit)


def test_requests_made_from_the_description(target):
    known = {"digest": target.digest, "identity": target.session, "batch": "0" * 32}
    tally = by_description(target.server.url, known, 120)
    assert {200, 401, 404, 405, 422} <= set(tally.statuses) and tally.inputs > 100, tally
    target.check()


def test_batches_with_changed_bytes(target):
    tally = by_changes(target.client, target.path, target.batch(), 150)
    assert tally.statuses[422] > 50, tally
    target.check()


def test_requests_to_linear_layers(tokens, tmp_path):
    with (
        running(random_matrices(tmp_path / "server"), tmp_path / "state", "--tokens", tokens) as server,
        httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client,
    ):
        tally = by_sizes(client, 32, 100)
        assert {200, 404, 405, 413, 422} <= set(tally.statuses), tally
        assert client.get("/specification").is_success
