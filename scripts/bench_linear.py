"""What private linear layers cost, ahead and online, beside the float model and beside Zama's engine.

    python scripts/bench_linear.py                       # GPT-2's 124M shape, random weights; ten minutes
    python scripts/bench_linear.py --model tiny
    python scripts/bench_linear.py --zama PYTHON         # an interpreter that has concrete-ml-extensions 0.2.0
    python scripts/bench_linear.py --growth              # products ahead, one layer of larger shapes, scaled

A server process and this one, on loopback and the same cores. Ahead: masks for one batch, 2,048 tokens, all of it
(encryption, transfer, product, decryption, storage). Online: 64 tokens after a prompt of 64, in turns with the float
model; medians. Nothing else should run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from fhe import rlwe
from fhe.rlwe.product import recombine, split
from jaxgpt2.evaluation import bundled_passages
from jaxgpt2.executors.processes import cores
from jaxgpt2.generation import generate_tokens
from jaxgpt2.linear import LinearGPT2
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.serving.bundle import Bundle
from jaxgpt2.serving.linear_bundle import shapes_of, traffic, write_bundles
from jaxgpt2.serving.masked import Masked, in_processes, prepare, store_for
from jaxgpt2.serving.remote import Connection, RemoteOwner
from machine import environment, table

PROMPT, NEW = 64, 64

# Zama's engine computes one product of this shape; ours is timed on the same one.
ZAMA_SHAPE = (768, 2304)
ZAMA = """
import time, numpy as np, concrete_ml_extensions as cml
params = cml.MatmulCryptoParameters.deserialize(cml.default_params())
rng = np.random.default_rng(0)
weight = rng.integers(0, 256, {shape}).astype(np.uint64)
x = rng.integers(0, 256, (1, {shape}[0])).astype(np.uint64)
secret, compression = cml.create_private_key(params)
encrypted = cml.encrypt_matrix(secret, params, x)
start = time.perf_counter()
result = cml.matrix_multiplication(encrypted, weight, compression)
print(time.perf_counter() - start)
"""

GROWTH = {"124M": 768, "medium": 1024, "large": 1280, "XL": 1600}
LAYERS = {"124M": 12, "medium": 24, "large": 36, "XL": 48}


def random_model(config: GPT2Config) -> GPT2:
    """Random weights, small enough for activations like a trained model's. Its texts are token ids."""
    from flax import nnx

    from jaxgpt2.models.gpt2.model import Transformer

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    return GPT2(config, Transformer(config, nnx.Rngs(0)), tokenizer)


@contextlib.contextmanager
def serving(bundle: Path, state: Path) -> Iterator[tuple[str, int]]:
    """A server process of a bundle: its address and process id."""
    command = [sys.executable, "-m", "jaxgpt2.cli", "serve", str(bundle), "--port", "0", "--state", str(state)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if '"listening"' in line:
                break
        yield json.loads(line)["url"], process.pid
    finally:
        process.terminate()
        process.wait()


def memory_of(pid: int) -> float:
    """The most memory that a process had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def measure(gpt2: GPT2, repeat: int) -> dict[str, Any]:
    model = LinearGPT2.quantize(gpt2, bundled_passages("calibration")[:16])
    client = model.client
    found: dict[str, Any] = {
        "failure_log2": max(report.failure_log2 for report in model.reports().values()), **traffic(client)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_bundles(model, path / "bundles", {})
        identity = Bundle.read(path / "bundles" / "client", "client").id
        with serving(path / "bundles" / "server", path / "state") as (url, pid):
            connection = Connection(url)
            owner = RemoteOwner(connection, client.shapes)
            owner.check(identity)
            store = store_for(client, path / "masks", path / "ledgers")
            started = time.perf_counter()
            with in_processes(functools.partial(connected, url, client.shapes), cores()) as make:
                prepare(client, store, make, 1, lambda done: None)
            found["ahead_seconds"] = time.perf_counter() - started
            found["ahead_seconds_per_token"] = found["ahead_seconds"] / store.left()
            prompt = [int(token) for token in np.random.default_rng(0).integers(1, 256, PROMPT)]
            rates: dict[str, list[float]] = {"float": [], "private": []}
            first: list[float] = []
            in_float: list[int] = []
            private: list[int] = []
            for _ in range(repeat):
                started = time.perf_counter()
                logits = gpt2.cached_logits(PROMPT + NEW)
                stream = generate_tokens(logits, prompt, NEW + 1)
                next(stream)
                middle = time.perf_counter()
                in_float = list(stream)
                rates["float"].append(NEW / (time.perf_counter() - middle))

                masked = Masked(client, owner, store.claim(PROMPT + NEW))
                started = time.perf_counter()
                stream = client.continue_tokens(prompt, NEW + 1, masked)
                next(stream)
                middle = time.perf_counter()
                first.append(middle - started)
                private = list(stream)
                rates["private"].append(NEW / (time.perf_counter() - middle))
            found["texts_equal"] = in_float == private
            found["seconds_to_first_token"] = statistics.median(first[1:] or first)
            for name, values in rates.items():
                found[f"{name}_tokens_per_second"] = statistics.median(values[1:] or values)
            found["share_of_float"] = found["private_tokens_per_second"] / found["float_tokens_per_second"]
            empty = np.zeros((1, client.config.n_embd), np.uint32)
            smallest = next(iter(client.shapes))
            trips = [timed(lambda: owner.online(smallest, empty)) for _ in range(200)]
            found["round_trip_seconds"] = statistics.median(trips)
            found["server_bytes"] = memory_of(pid)
            found["client_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
            connection.close()
    return found


def connected(url: str, shapes: dict[str, tuple[int, int]]) -> RemoteOwner:
    return RemoteOwner(Connection(url), shapes)


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def product_ahead(inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of a product ahead for 2,048 tokens, all of it and its matmuls alone; the client's part; and online."""
    parameters, random = rlwe.Parameters(), np.random.default_rng(0)
    weight = random.integers(-127, 128, (inputs, outputs))
    matrix = rlwe.Matrix(weight, parameters)
    residues = random.integers(0, parameters.coeff_modulus, (inputs, 2 * parameters.poly_modulus_degree), np.uint64)
    server = statistics.median(timed(lambda: [None for _ in matrix.ahead(residues)]) for _ in range(3))
    low, high = split(np, residues, parameters)
    left = matrix.weights.T
    matmul = statistics.median(timed(lambda: (left @ low, left @ high)) for _ in range(3))
    recombine(np, (left[:1] @ low), (left[:1] @ high), parameters)
    masked = random.integers(0, 2**32, (1, inputs), np.uint32)
    matrix.online(masked)
    online = statistics.median(timed(lambda: matrix.online(masked)) for _ in range(50))
    return {"server": server, "matmul": matmul, "online": online}


def beside_zama(python: str | None) -> dict[str, Any]:
    """One product of ZAMA_SHAPE: ours, ahead (amortised) and online together, and Zama's."""
    inputs, outputs = ZAMA_SHAPE
    parameters = rlwe.Parameters()
    ours = product_ahead(inputs, outputs)
    weight = np.random.default_rng(0).integers(-127, 128, ZAMA_SHAPE)
    matrix = rlwe.Matrix(weight, parameters)
    masks = rlwe.masks([rlwe.new_seed() for _ in range(parameters.poly_modulus_degree)], 0, inputs)

    def ahead() -> None:
        with rlwe.ClientBatch(parameters) as keys:
            keys.decrypt(b"".join(matrix.answer(keys.encrypt(masks))), outputs)

    whole = timed(ahead) / parameters.poly_modulus_degree
    found: dict[str, Any] = {"ahead": whole, "online": ours["online"], "together": whole + ours["online"]}
    if python is not None:
        ran = subprocess.run([python, "-c", ZAMA.format(shape=ZAMA_SHAPE)], capture_output=True, text=True, check=True)
        found["zama"] = float(ran.stdout.split()[-1])
        found["times"] = found["zama"] / found["together"]
    return found


def costs_table(found: dict[str, Any]) -> str:
    """What was wanted of the 124M shape is the goals that this project set itself."""
    product, shape = found["one_product"], f"{ZAMA_SHAPE[0]:,} to {ZAMA_SHAPE[1]:,}"
    up, down = (found[f"online_bytes_{way}"] / 1e6 for way in ("up", "down"))
    ahead = (found["ahead_bytes_up"] + found["ahead_bytes_down"]) / 1e6
    rows: list[tuple[str, ...]] = [
        ("ahead, server and client together, a token of 2,048", f"{found['ahead_seconds_per_token']:.4f} s", "0.05 s"),
        ("ahead, traffic a token, both ways", f"{ahead:.2f} MB", "2 MB"),
        (f"online, {NEW} tokens after {PROMPT}", f"{found['private_tokens_per_second']:.2f} tokens a second", ""),
        ("the float model in the same run", f"{found['float_tokens_per_second']:.1f} tokens a second", ""),
        ("private to float", f"{found['share_of_float']:.3f}", "0.20"),
        (f"time to the first token, a prompt of {PROMPT}", f"{found['seconds_to_first_token']:.2f} s", ""),
        ("a round trip on loopback; 4 of them a layer", f"{1e3 * found['round_trip_seconds']:.2f} ms", ""),
        ("online, traffic a token, up and down", f"{up:.2f} and {down:.2f} MB", ""),
        ("masks kept on the disk, a token", f"{found['stored_bytes'] / 1e6:.2f} MB", ""),
        ("memory, server and client", f"{found['server_bytes'] / 1e9:.2f} and {found['client_bytes'] / 1e9:.2f} GB",
         "4 and 4 GB"),
        (f"one product, {shape}, ahead and online together", f"{1e3 * product['together']:.2f} ms", ""),
        ("share of the matmul in a product ahead", f"{found['matmul_share']:.2f}", ""),
    ]  # fmt: skip
    if "zama" in product:
        same = f"{product['zama']:.1f} s: {product['times']:,.0f} times as long"
        rows.insert(-1, ("the same by concrete-ml-extensions 0.2.0, 8 bits", same, "5,000"))
    return f"{found['model']}; {found['environment']}\n\n{table(('', 'measured', 'wanted'), rows)}"


def growth_table(found: dict[str, Any]) -> str:
    columns = ("server_ahead_seconds_per_token", "matmul_share", "server_online_seconds_per_token")
    header = ("shape", "layers, width", "server ahead, s a token", "share of the matmul", "server online, s a token")
    rows: list[tuple[str, ...]] = [
        (name, f"{LAYERS[name]}, {GROWTH[name]:,}", *(f"{row[column]:.3f}" for column in columns))
        for name, row in found["growth"].items()
    ]
    return f"{found['environment']}\n\n{table(header, rows)}"


@click.command(help=__doc__)
@click.option("--model", default="124M", show_default=True, help="124M, with random weights, or a name as elsewhere.")
@click.option("--repeat", default=6, show_default=True, help="Texts online; the first one warms up.")
@click.option("--zama", metavar="PYTHON", help="An interpreter with Zama's engine.")
@click.option("--growth", is_flag=True, help="Only the products ahead, of larger shapes.")
@click.option("--json", "as_json", is_flag=True)
def bench(model: str, repeat: int, zama: str | None, growth: bool, as_json: bool) -> None:
    where = environment("jax", "numpy", "tenseal", "cryptography")
    if growth:
        rows = {}
        for name, width in GROWTH.items():
            config = GPT2Config(n_embd=width, n_layer=1, n_head=width // 64)
            costs = [product_ahead(*shape) for shape in shapes_of(config).values()]
            layer = {key: sum(cost[key] for cost in costs) for key in ("server", "matmul", "online")}
            size = rlwe.Parameters().poly_modulus_degree
            rows[name] = {
                "server_ahead_seconds_per_token": LAYERS[name] * layer["server"] / size,
                "matmul_share": layer["matmul"] / layer["server"],
                "server_online_seconds_per_token": LAYERS[name] * layer["online"],
            }
        found: dict[str, Any] = {"growth": rows}
    else:
        gpt2 = random_model(GPT2Config(eos_token_id=None)) if model == "124M" else GPT2.from_pretrained(model)
        found = {"model": model, **measure(gpt2, repeat), "one_product": beside_zama(zama)}
        shape = product_ahead(gpt2.config.n_embd, 3 * gpt2.config.n_embd)
        found["matmul_share"] = shape["matmul"] / shape["server"]
    found["environment"] = where
    click.echo(json.dumps(found) if as_json else (growth_table if growth else costs_table)(found))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bench()
