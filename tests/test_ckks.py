"""The CKKS engine: the same slot functions on ciphertexts as in NumPy, keys, files, errors; and a whole head."""

import dataclasses
import json
import stat
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from fhe.ckks.slots import CleartextSimulator, Layout, project

import fhe

pytest.importorskip("tenseal", reason="the CKKS engine is optional")

from fhe import ckks, wire
from jaxgpt2 import methods
from jaxgpt2.decoding import LocalExecutor, quantize_input
from jaxgpt2.methods import polynomial
from jaxgpt2.methods.method import HeadWeights, float_head
from jaxgpt2.quantize import Bits

SLOTS = 4096  # ring 8192: four levels
LAYOUT = Layout.fit(SLOTS, 20, 4, 8)


def everything(ops, params, x, y):
    """Every operation of a machine once, on two inputs; and, to be kept, a projection of x."""
    with ops.tag("projection"):
        (z,) = project(ops, LAYOUT, x, [params])
    with ops.tag("rest"):
        product = ops.sum_of_products([z, y], [y, x])
        moved = ops.add(ops.rotate(product, -3), ops.conjugate(product))
        result = ops.subtract(ops.add_plain(moved, np.arange(8) * 1j), z)
        square = ops.sum_of_products([result], [result])
    return ops.sum_of_plaintext_products([square, x], [0.25, np.linspace(-1, 1, SLOTS)]), z


def with_kept(ops, params, x, z):
    return ops.sum_of_products([x], [z]), ops.level_drop(z, 2)


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """In slot 0 noise is up to a hundred times as large as elsewhere."""
    errors = np.abs(found - wanted) / np.abs(wanted).max()
    return bool(errors[1:].max() < 1e-3 and errors[0] < 1e-2)


def numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, SLOTS)


PARAMS = np.random.default_rng(0).normal(size=(20, 4)) * 0.2


def functions() -> dict[str, fhe.Function]:
    first = fhe.Function(everything, [(numbers(i), numbers(i + 9)) for i in range(3)])
    second = fhe.Function(with_kept, [(numbers(1), numbers(2))], ((), (fhe.Output("everything", 1),)))
    return {"second": second, "everything": first}  # the order does not matter


@pytest.fixture(scope="module")
def circuit() -> ckks.CKKSCircuit:
    return ckks.CKKSBackend().compile(functions(), PARAMS)


@pytest.fixture(scope="module")
def keys(circuit) -> ckks.CKKSKeys:
    return circuit.make_keys()


def test_ciphertexts_do_what_the_machine_does(circuit, keys):
    x, y = numbers(20), numbers(21)
    blobs = circuit.encrypt(keys, "everything", x, y)
    results, counts = circuit.run_counted("everything", blobs, keys.evaluation)
    wanted, kept = circuit.simulate("everything", x, y)
    (found,) = circuit.decrypt(keys, "everything", results[:1])
    assert close(found, wanted)
    again = circuit.encrypt(keys, "second", x)
    (found,) = circuit.decrypt(keys, "second", circuit.run("second", [*again, results[1]], keys.evaluation)[:1])
    assert close(found, circuit.simulate("second", x, kept)[0])

    machine = CleartextSimulator(SLOTS)
    everything(machine, PARAMS, machine.load(x), machine.load(y))
    assert counts == machine.counts  # the same counts, at the same depths, by stage
    assert {name: cost.levels for name, cost in circuit.report.functions.items()} == {"everything": 4, "second": 2}


def test_a_prepared_function_has_nothing_left_to_encode(keys):
    circuit = ckks.CKKSBackend().compile(functions(), PARAMS)
    for name in functions():
        circuit.prepare(name)
    encoded = dict(circuit._engine._encoded)
    keys = circuit.make_keys()
    circuit.run("everything", circuit.encrypt(keys, "everything", numbers(1), numbers(2)), keys.evaluation)
    assert circuit._engine._encoded.keys() == encoded.keys()


def test_the_report_counts_and_measures(circuit, keys):
    report = circuit.report
    blobs = circuit.encrypt(keys, "everything", numbers(1), numbers(2))
    results = circuit.run("everything", blobs, keys.evaluation)
    assert report.security_bits == 128 and report.modulus_bits <= ckks.max_log_q(report.poly_modulus_degree)
    assert report.rotation_keys == len(circuit._description.rotations) + 1
    assert report.functions["everything"].total("product") == 3
    assert report.evaluation_key_source == "serialized"
    assert report.evaluation_key_bytes == len(keys.evaluation)
    cost = report.functions["everything"]
    assert 0.8 < cost.input_ciphertext_bytes / sum(map(len, blobs)) < 1.25
    assert 0.8 < cost.output_ciphertext_bytes / len(results[0]) < 1.25  # the other one stays
    twice = report.cost_of({"everything": 2, "second": 1})
    assert twice.counts == {"rotations": 2 * cost.total("rotation"), "products": 7, "levels": 4}
    assert twice.estimated_run_seconds > 2 * cost.estimated_run_seconds
    assert ckks.SlotReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_estimated_keys_are_about_as_large_as_real_ones(keys):
    estimated = ckks.CKKSBackend().compile(functions(), PARAMS).report
    assert estimated.evaluation_key_source == "estimated"
    assert 0.8 < estimated.evaluation_key_bytes / len(keys.evaluation) < 1.25


def test_keys_hold_the_rotations_in_use_and_no_others(circuit, keys):
    machine = CleartextSimulator(SLOTS)
    everything(machine, PARAMS, *map(machine.load, (numbers(1), numbers(2))))
    assert set(circuit._description.rotations) == machine.counts.rotations
    assert 5 not in machine.counts.rotations
    with pytest.raises(ValueError, match="not present"):
        ops = ckks.CKKSOps(circuit._engine, *_loaded(circuit, keys))
        ops.rotate(_input(circuit, keys), 5)


def _input(circuit, keys):
    return circuit._ciphertext(
        wire.unpack(circuit.encrypt(keys, "second", numbers(0))[0], "input 0 of second", circuit.id).parts[0]
    )


def _loaded(circuit, keys):
    server = circuit._with_evaluation_keys(keys.evaluation)
    return server.relinearization, server.rotations


def test_encryption_is_random_and_hides(circuit, keys):
    x = numbers(3)
    first, second = (circuit.encrypt(keys, "second", x)[0] for _ in range(2))
    assert first != second and len(first) == pytest.approx(len(second), rel=0.05)
    other = circuit.make_keys()
    stolen = dataclasses.replace(other, id=keys.id)
    results = circuit.run("everything", circuit.encrypt(keys, "everything", x, x), keys.evaluation)
    (wrong,) = circuit.decrypt(stolen, "everything", results[:1])
    assert np.abs(wrong).max() > 1e3  # noise as large as the modulus


def test_keys_on_disk(circuit, keys, tmp_path):
    keys.save(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600
    loaded = circuit.load_keys(tmp_path / "keys")
    results = circuit.run("everything", circuit.encrypt(keys, "everything", numbers(1), numbers(2)), loaded.evaluation)
    (found,) = circuit.decrypt(loaded, "everything", results[:1])
    assert close(found, circuit.simulate("everything", numbers(1), numbers(2))[0])


def test_a_seed_fixes_the_secret_key(circuit):
    first, second, third = (ckks._to_bytes(circuit.make_keys(seed).secret) for seed in (1, 1, 2))
    assert first == second != third


def test_a_saved_circuit_serves_and_half_of_it_is_a_client(circuit, keys, tmp_path):
    circuit.save(tmp_path / "server")
    server = ckks.CKKSBackend().load(tmp_path / "server")
    assert server.id == circuit.id and server.report == circuit.report
    circuit.save(tmp_path / "client", server=False)
    client = ckks.CKKSBackend().load(tmp_path / "client")
    results = server.run("everything", client.encrypt(keys, "everything", numbers(1), numbers(2)), keys.evaluation)
    (found,) = client.decrypt(keys, "everything", results[:1])
    assert close(found, circuit.simulate("everything", numbers(1), numbers(2))[0])
    with pytest.raises(fhe.NoWeights, match="without its weights"):
        client.run("everything", [], keys.evaluation)


def test_damaged_files(circuit, tmp_path):
    circuit.save(tmp_path)
    content = (tmp_path / "server.bin").read_bytes()
    (tmp_path / "server.bin").write_bytes(content[:-5])
    with pytest.raises(fhe.CircuitFormatError, match="checksum"):
        ckks.CKKSBackend().load(tmp_path)
    (tmp_path / "circuit.json").write_text("{}")
    with pytest.raises(fhe.CircuitFormatError, match="damaged"):
        ckks.CKKSBackend().load(tmp_path)


def test_keys_and_ciphertexts_of_another_client_or_circuit(circuit, keys):
    blobs = circuit.encrypt(keys, "everything", numbers(1), numbers(2))
    other = circuit.make_keys()
    with pytest.raises(fhe.KeyMismatch, match="made with keys"):
        circuit.run("everything", blobs, other.evaluation)
    elsewhere = ckks.CKKSBackend().compile(functions(), PARAMS * 2)
    with pytest.raises(fhe.KeyMismatch, match="made for circuit"):
        elsewhere.encrypt(keys, "second", numbers(1))
    with pytest.raises(fhe.KeyMismatch, match="not keys of the ckks backend"):
        circuit.encrypt(cast(Any, object()), "second", numbers(1))


def test_inputs_that_do_not_fit(circuit, keys):
    x = numbers(1)
    with pytest.raises(ValueError, match="no function 'third'"):
        circuit.encrypt(keys, "third", x)
    with pytest.raises(ValueError, match="are 2 arrays, not 1"):
        circuit.encrypt(keys, "everything", x)
    with pytest.raises(ValueError, match="finite"):
        circuit.encrypt(keys, "second", x * np.nan)
    with pytest.raises(ValueError, match="finite"):
        circuit.encrypt(keys, "second", x[:10])
    blobs = circuit.encrypt(keys, "everything", x, x)
    with pytest.raises(fhe.CircuitFormatError, match="expected output 1 of everything"):
        circuit.run("second", circuit.encrypt(keys, "second", x) * 2, keys.evaluation)
    with pytest.raises(fhe.CircuitFormatError, match="checksum"):
        circuit.run("everything", [blobs[0], blobs[1][:-1] + b"?"], keys.evaluation)


def test_parameters_below_128_bits_are_refused():
    with pytest.raises(fhe.InsecureParameters, match="128-bit security"):
        ckks.Parameters(poly_modulus_degree=8192, levels=8, scale_bits=40, headroom_bits=10)
    with pytest.raises(fhe.InsecureParameters, match="too few to compute with"):
        ckks.Parameters.choose(8192, 20, 14)
    with pytest.raises(fhe.InsecureParameters, match="128-bit security"):
        ckks.CKKSBackend(scale_bits=60).compile(functions(), PARAMS)


@pytest.mark.parametrize("ring", [8192, 16384, 32768])
def test_chosen_parameters_use_what_is_secure(ring):
    parameters = ckks.Parameters.choose(ring, 4, 14)
    assert parameters.total_bits <= ckks.max_log_q(ring)
    assert parameters.scale_bits == 40 or parameters.total_bits > ckks.max_log_q(ring) - 6
    assert parameters.context().parameters_set()


def test_numbers_too_large_for_the_moduli_are_refused_before_they_overflow():
    function = {"f": fhe.Function(lambda ops, _, x: (ops.sum_of_plaintext_products([x], [1e4]),), [(numbers(0),)])}
    with pytest.raises(fhe.CompilationError, match="2 more bits of headroom"):
        ckks.CKKSBackend().compile(function, None)
    ckks.CKKSBackend(headroom_bits=17).compile(function, None)


def test_functions_that_wait_for_each_other():
    inputset = [(numbers(1), numbers(2))]
    loop = {"a": fhe.Function(with_kept, inputset, ((), (fhe.Output("a", 1),)))}
    with pytest.raises(fhe.CompilationError, match="wait for each other"):
        ckks.CKKSBackend().compile(loop, PARAMS)
    uneven = functions() | {
        "third": fhe.Function(with_kept, inputset, ((), (fhe.Output("everything", 1), fhe.Output("second", 1))))
    }
    with pytest.raises(fhe.CompilationError, match="several depths"):
        ckks.CKKSBackend().compile(uneven, PARAMS)


def test_the_backend_is_registered_and_integer_formulas_do_not_fit_it():
    backend = fhe.get_backend("ckks")
    assert backend.version().startswith("tenseal")
    fitting = [name for name in methods.names() if methods.get(name).needs <= backend.offers]
    assert fitting == ["polynomial"]


def test_a_head_on_ciphertexts_with_a_cache_and_nothing_out_of_range():
    """Seven tokens, then one more, decrypted and compared with the float head; then an input far out of range."""
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=shape) * scale

    width, size, tokens = 40, 16, 7
    weights = HeadWeights(
        draw(width, size, scale=0.12),
        draw(size, scale=0.3),
        draw(width, size, scale=0.12),
        draw(size),
        draw(width, size, scale=0.2),
        draw(size),
        draw(size, width),
        np.eye(size),
    )
    texts = [draw(tokens + 1, width) for _ in range(60)]
    found = polynomial.calibrate(weights, texts, Bits.of(4), 8, score_rank=0, value_rank=0, squarings=4)
    program = methods.get("polynomial").head
    functions = program.reading.functions(program, found, texts[:3], tokens + 1)
    circuit = ckks.CKKSBackend().compile({n: f for n, f in functions.items() if n != "prompt_2"}, found.params)
    keys = circuit.make_keys()
    x = texts[5]
    reader = program.reading.reader(found.client, LocalExecutor(circuit, keys), tokens + 1)
    levels = np.asarray(quantize_input(found, jnp.asarray(x, jnp.float32)), np.int64)
    reader.read(levels[:tokens])
    numerators, denominators = reader.read(levels)
    output, wanted = numerators / denominators @ found.decoding.basis + found.decoding.mean, float_head(weights, x)
    # One of 16 dimensions is the shift's, and random weights have none to spare.
    assert np.linalg.norm(output - wanted) / np.linalg.norm(wanted) < 0.04
    numerators, denominators = polynomial.attend(found.params, levels * found.input_scale)
    exact = numerators / denominators @ found.decoding.basis + found.decoding.mean
    assert np.linalg.norm(output - exact) / np.linalg.norm(exact) < 1e-3
    with pytest.raises(polynomial.OutOfRange):
        reader.read(levels[:tokens] * 30)
