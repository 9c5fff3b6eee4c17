"""The Concrete backend: real keys and real ciphertexts, on very small functions."""

import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import fhe
from fhe import clear, envelope

pytest.importorskip("concrete.fhe", reason="needs the extra 'fhe'")

BACKEND = "concrete"
# The tests look up fewer than 10,000 times: at this p_error one of them is wrong with a probability below 1e-6.
P_ERROR = 1e-10


@dataclass(frozen=True)
class Params:
    """Of `tiny_head`, an attention head with every kind of operation."""

    weights: np.ndarray  # (3, 4, 2)
    narrow: fhe.LookupTable
    exponential: fhe.LookupTable
    output: fhe.LookupTable
    mask: np.ndarray  # (2, 2)


def tiny_head(ops, params, x):
    """x (2, 4) -> (2, 2) and (2, 1): unsigned times signed, a row maximum, a mask, two outputs of different widths."""
    projections = []
    for name, weight in zip(("query", "key", "value"), params.weights, strict=True):
        with ops.tag(name):
            projections.append(ops.lookup(params.narrow, ops.matmul(x, weight)))
    query, key, value = projections
    with ops.tag("scores"):
        scores = ops.matmul(query, key.transpose((1, 0)))
    with ops.tag("softmax"):
        shifted = scores - ops.max(scores, axis=-1, keepdims=True)
        weights = ops.lookup(params.exponential, shifted) * params.mask
    with ops.tag("output"):
        return ops.lookup(params.output, ops.matmul(weights, value)), weights.sum(axis=-1, keepdims=True)


PARAMS = Params(
    weights=np.random.default_rng(5).integers(-1, 2, (3, 4, 2)),
    narrow=fhe.LookupTable.build(lambda v: np.clip(v / 4, -1, 1), -2, 2, shift=1),
    exponential=fhe.LookupTable.build(lambda v: 3 * np.exp(v / 2), -4, 0),
    output=fhe.LookupTable.build(lambda v: v / 2, -3, 3, shift=1),
    mask=np.array([[1, 0], [1, 1]]),
)


def samples(shape, low, high, count=60, seed=0):
    """Random inputs of a range, and its extremes."""
    rng = np.random.default_rng(seed)
    ends = [np.full(shape, low), np.full(shape, high)]
    return [(value,) for value in (*(rng.integers(low, high + 1, shape) for _ in range(count)), *ends)]


INPUTSET = samples((2, 4), -2, 2)


def compiled(function: Any = tiny_head, params: Any = PARAMS, inputset: Any = INPUTSET, **changes: Any) -> Any:
    config = fhe.FHEConfig(P_ERROR, **changes)
    return fhe.get_backend(BACKEND).compile({"head": fhe.Function(function, inputset)}, params, config)


def encrypted(circuit, keys, *inputs):
    return circuit.decrypt(keys, "head", circuit.run("head", circuit.encrypt(keys, "head", *inputs), keys.evaluation))


def assert_same(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == np.int64
        assert np.array_equal(result, wanted), f"got {result.tolist()}, wanted {wanted.tolist()}"


@pytest.fixture(scope="module")
def head():
    circuit = compiled(rounding="none")  # "exact" has the same results and ten times the keys
    return circuit, circuit.make_keys()


def test_results_equal_numpys(head):
    circuit, keys = head
    for sample in INPUTSET[:2] + INPUTSET[-2:]:
        expected = tiny_head(fhe.NumpyOps(), PARAMS, *sample)
        assert_same(circuit.simulate("head", *sample), expected)
        assert_same(encrypted(circuit, keys, *sample), expected)


def test_a_broken_connection_is_an_error_and_not_the_end_of_the_process(head):
    encrypted(*head, INPUTSET[0][0])  # Concrete's runtime starts with the first run
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"to nobody")
    os.close(writer)


def test_report(head):
    circuit, keys = head
    report = circuit.report
    counts = {stage: sum(widths.values()) for stage, widths in report.pbs_by_stage.items()}
    assert counts == {"query": 4, "key": 4, "value": 4, "scores": 16, "softmax": 6, "output": 16 + 4}
    assert report.pbs_count == sum(counts.values())
    assert report.max_bit_width == max(report.pbs_by_bit_width)
    assert (report.evaluation_key_bytes, report.evaluation_key_source) == (len(keys.evaluation), "serialized")
    assert report.complexity > 0
    assert 0 < report.p_error < report.global_p_error < 1
    json.dumps(report.to_json())


@pytest.mark.parametrize("rounding", ["exact", "approximate", "none"])
def test_the_clear_backend_counts_like_concrete(rounding):
    functions = {"head": fhe.Function(tiny_head, INPUTSET)}
    report = fhe.get_backend("clear").compile(functions, PARAMS, fhe.FHEConfig(rounding=rounding)).report
    counted = compiled(rounding=rounding).report
    assert {stage: sum(widths.values()) for stage, widths in report.pbs_by_stage.items()} == {
        stage: sum(widths.values()) for stage, widths in counted.pbs_by_stage.items()
    }
    assert report.max_bit_width == counted.max_bit_width


def random_function(seed):
    """A random function of one (2, 3) input, its parameters, and its input set."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-1, 2, (3, 3)) + 2 * np.eye(3, dtype=np.int64)
    tables = []
    for _ in range(3):
        slope, offset, low = rng.choice([-0.6, 0.4, 0.7]), rng.integers(-1, 2), int(rng.integers(-6, -1))
        shift = int(rng.integers(0, 2))
        tables.append(
            fhe.LookupTable.build(lambda v, a=slope, b=offset: np.clip(a * v + b, -2, 2), low, -low - 1, shift)
        )
    steps = rng.permutation(5)[:2].tolist()

    def function(ops, tables, x):
        outputs = []
        y = ops.lookup(tables[0], ops.matmul(x, weight))
        for table, step in zip(tables[1:], steps, strict=True):
            with ops.tag(f"step{step}"):
                if step == 0:
                    y = ops.matmul(y, y.transpose((1, 0)))[:, :1] + y
                elif step == 1:
                    y = ops.max(y, axis=1, keepdims=True) - y
                elif step == 2:
                    y = y * y[:, 1:2]
                elif step == 3:
                    y = ops.concatenate((y[:, 1:], 2 - y[:, :1]), axis=1)
                else:
                    outputs.append(y.sum(axis=1))
                y = ops.lookup(table, y)
        return *outputs, y

    low = int(rng.integers(-2, 1))
    return function, tables, samples((2, 3), low, low + 2, seed=seed)


@pytest.mark.parametrize("seed", range(12))
def test_random_functions_simulate_to_numpys(seed):
    function, params, inputset = random_function(seed)
    circuit = compiled(function, params, inputset, rounding=("none", "exact")[seed % 4 == 0])
    for sample in inputset[:3] + inputset[-2:]:
        assert_same(circuit.simulate("head", *sample), function(fhe.NumpyOps(), params, *sample))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_random_functions_decrypt_to_numpys(seed):
    function, params, inputset = random_function(seed)
    circuit = compiled(function, params, inputset, rounding="none")
    keys = circuit.make_keys()
    for sample in inputset[:3] + inputset[-2:]:
        assert_same(encrypted(circuit, keys, *sample), function(fhe.NumpyOps(), params, *sample))


# Issues 1307 and 1309 of zama-ai/concrete: results that simulate correctly and decrypt wrongly.
RETURNS = {
    "one variable": lambda ops, params, x: (ops.lookup(params, x),),
    "its double": lambda ops, params, x: (ops.lookup(params, x) + ops.lookup(params, x),),
    "an input": lambda ops, params, x: (x, x + x),
    "with an earlier one": lambda ops, params, x: (ops.lookup(params, x + x), x + x, x),
    "a variable twice": lambda ops, params, x: (y := ops.lookup(params, x), y, 7 * y + x),
}


@pytest.mark.parametrize("name", RETURNS)
def test_every_kind_of_result_decrypts(name):
    table = fhe.LookupTable.build(lambda v: np.abs(v) - 1, -4, 3)
    inputset = samples((3,), -4, 3)
    circuit = compiled(RETURNS[name], table, inputset)
    keys = circuit.make_keys()
    for sample in inputset[:2] + inputset[-2:]:
        expected = RETURNS[name](fhe.NumpyOps(), table, *sample)
        assert_same(circuit.simulate("head", *sample), expected)
        assert_same(encrypted(circuit, keys, *sample), expected)


def test_unsigned_times_signed_at_the_ends():
    """concrete-python 2.11.0 alone gives wrong results: 7 * -4 and 7 * 3 need one bit more than it takes."""

    def function(ops, params, x, y):
        return (ops.lookup(params, x) * ops.lookup(params, y),)

    table = fhe.LookupTable(np.arange(-8, 8), low=-8)
    ends = [(np.full(2, a), np.full(2, b)) for a in (0, 7) for b in (-4, 3)]
    circuit = compiled(function, table, ends)
    keys = circuit.make_keys()
    for sample in ends:
        assert_same(circuit.simulate("head", *sample), (sample[0] * sample[1],))
        assert_same(encrypted(circuit, keys, *sample), (sample[0] * sample[1],))


def test_approximate_rounding_gives_the_same_or_a_neighbouring_entry():
    table = fhe.LookupTable(np.arange(-100, 100), low=-100, shift=4)  # so a result is the entry's number
    inputset = samples((40,), -56, 55)
    circuit = compiled(lambda ops, params, x: (ops.lookup(params, x),), table, inputset, rounding="approximate")
    assert "neighbouring" in circuit.report.noise
    assert circuit.report.pbs_count == 40
    keys = circuit.make_keys()
    x = np.concatenate((np.arange(-56, -36), np.arange(36, 56)))  # every boundary of both ends
    off = [np.abs(results[0] - table(x)) for results in (circuit.simulate("head", x), encrypted(circuit, keys, x))]
    # An entry is 16 wide. p_error says that its half, 8, is at least 6.4 deviations of the noise. So an entry two away
    # takes 12.8. Of these 80 results 6.4 are expected to be neighbours, at most: 40 are with a probability below
    # exp(-6.4) (6.4 e / 40)**40, or 1e-17 (Chernoff).
    assert np.max(off) <= 1
    assert np.mean(off) < 0.5
    # More than 4 from a boundary a neighbour comes with a probability below 1e-3, and 0.2 of these 28 results are
    # neighbours below 1e-12.
    far = np.abs((x + 8) % 16 - 8) < 4
    assert np.mean(np.array(off)[:, far]) < 0.2


@pytest.mark.slow
def test_a_circuit_in_another_process(head, tmp_path):
    """Client, server and simulation of a saved circuit, in a process without the function."""
    circuit, keys = head
    circuit.save(tmp_path / "circuit")
    keys.save(tmp_path / "keys")
    (tmp_path / "ciphertexts").write_bytes(*circuit.encrypt(keys, "head", *INPUTSET[0]))
    (tmp_path / "evaluation").write_bytes(keys.evaluation)
    code = """if True:
        import sys, pathlib, numpy, fhe
        here = pathlib.Path(sys.argv[1])
        circuit = fhe.get_backend("concrete").load(here / "circuit")
        results = circuit.run("head", [(here / "ciphertexts").read_bytes()], (here / "evaluation").read_bytes())
        [(here / f"result{i}").write_bytes(result) for i, result in enumerate(results)]
        keys = circuit.load_keys(here / "keys")
        x = numpy.array(eval(sys.argv[2]))
        results = circuit.run("head", circuit.encrypt(keys, "head", x), keys.evaluation)
        decrypted = circuit.decrypt(keys, "head", results)
        simulated = circuit.simulate("head", x)
        print([y.tolist() for y in simulated], [y.tolist() for y in decrypted], circuit.report.pbs_count)
    """
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(INPUTSET[1][0].tolist())]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [y.tolist() for y in tiny_head(fhe.NumpyOps(), PARAMS, *INPUTSET[1])]
    assert result.stdout == f"{expected} {expected} {circuit.report.pbs_count}\n"
    results = circuit.decrypt(keys, "head", [(tmp_path / f"result{i}").read_bytes() for i in range(2)])
    assert_same(results, tiny_head(fhe.NumpyOps(), PARAMS, *INPUTSET[0]))
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


@pytest.mark.slow
def test_the_clients_half_of_a_saved_circuit(head, tmp_path):
    circuit, keys = head
    circuit.save(tmp_path, server=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circuit.json", "client.json"]
    client = fhe.get_backend(BACKEND).load(tmp_path)
    assert (client.id, client.signatures) == (circuit.id, circuit.signatures)
    results = circuit.run("head", client.encrypt(keys, "head", *INPUTSET[0]), keys.evaluation)
    assert_same(client.decrypt(keys, "head", results), tiny_head(fhe.NumpyOps(), PARAMS, *INPUTSET[0]))
    own = client.make_keys()
    results = circuit.run("head", client.encrypt(own, "head", *INPUTSET[1]), own.evaluation)
    assert_same(client.decrypt(own, "head", results), tiny_head(fhe.NumpyOps(), PARAMS, *INPUTSET[1]))
    for computing in (
        lambda: client.run("head", [], keys.evaluation),
        lambda: client.simulate("head", *INPUTSET[0]),
        lambda: client.save(tmp_path),
    ):
        with pytest.raises(fhe.NoWeights, match="without its weights"):
            computing()
    (tmp_path / "client.json").write_bytes(b"{}")
    with pytest.raises(fhe.CircuitFormatError, match="damaged"):
        fhe.get_backend(BACKEND).load(tmp_path)


def test_a_client_never_opens_the_servers_files(head, tmp_path):
    circuit, keys = head
    circuit.save(tmp_path)
    for name in ("server.zip", "circuit.mlir"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()  # cannot be opened as a file
    client = fhe.get_backend(BACKEND).load(tmp_path, server=False)
    results = circuit.run("head", client.encrypt(keys, "head", *INPUTSET[0]), keys.evaluation)
    assert_same(client.decrypt(keys, "head", results), tiny_head(fhe.NumpyOps(), PARAMS, *INPUTSET[0]))
    with pytest.raises(fhe.CircuitFormatError):
        fhe.get_backend(BACKEND).load(tmp_path)


def test_evaluation_keys_are_the_same_bytes_after_loading(head, tmp_path):
    """So a server can recognize keys by their hash."""
    circuit, keys = head
    keys.save(tmp_path / "keys")
    assert circuit.load_keys(tmp_path / "keys").evaluation == keys.evaluation


@pytest.mark.parametrize("part", [b"", b"no ciphertext", bytes(64)])
def test_bytes_that_are_not_a_ciphertext(head, part):
    circuit, keys = head
    arrays = circuit.signatures.pack_inputs("head", circuit.id, keys.id, [part])
    with pytest.raises(fhe.CircuitFormatError, match="Concrete refuses the inputs of head"):
        circuit.run("head", arrays, keys.evaluation)
    strange = envelope.pack("evaluation keys", circuit.id, keys.id, [part])
    with pytest.raises(fhe.CircuitFormatError, match="Concrete refuses evaluation keys"):
        circuit.run("head", arrays, strange)


def test_damaged_files_are_refused(head, tmp_path):
    backend = fhe.get_backend(BACKEND)
    circuit, keys = head
    for name in ("server.zip", "circuit.mlir", "client.json", "circuit.json"):
        circuit.save(tmp_path)
        assert backend.load(tmp_path).id == circuit.id
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(fhe.CircuitFormatError, match="damaged") as info:
            backend.load(tmp_path)
        assert "\n" not in str(info.value)
    with pytest.raises(fhe.CircuitFormatError, match="cannot read"):
        backend.load(tmp_path / "absent")
    with pytest.raises(fhe.CircuitFormatError, match="damaged or cut short"):
        circuit.run("head", [x[:-5] for x in circuit.encrypt(keys, "head", *INPUTSET[0])], keys.evaluation)


def test_wrong_keys_are_refused(head, tmp_path):
    circuit, keys = head
    other = compiled(RETURNS["an input"], None, samples((2, 4), -2, 2))
    stranger = replace(keys, id="0" * 32)
    with pytest.raises(fhe.KeyMismatch, match="circuit"):
        other.encrypt(keys, "head", *INPUTSET[0])
    with pytest.raises(fhe.KeyMismatch, match="keys"):
        circuit.decrypt(
            stranger, "head", circuit.run("head", circuit.encrypt(keys, "head", *INPUTSET[0]), keys.evaluation)
        )
    with pytest.raises(fhe.KeyMismatch, match="keys"):
        circuit.run("head", circuit.encrypt(stranger, "head", *INPUTSET[0]), keys.evaluation)
    with pytest.raises(fhe.KeyMismatch, match="ClearKeys"):
        circuit.encrypt(clear.ClearKeys(circuit.id, keys.id), "head", *INPUTSET[0])
    keys.save(tmp_path / "keys")
    with pytest.raises(fhe.KeyMismatch, match="circuit"):
        other.load_keys(tmp_path / "keys")


def test_inputs_beyond_the_circuit_are_refused(head):
    circuit, keys = head
    with pytest.raises(ValueError):
        circuit.encrypt(keys, "head", np.full((2, 4), 1000))
    with pytest.raises(ValueError):
        circuit.encrypt(keys, "head", np.zeros((3, 4), int))
    with pytest.raises(ValueError, match=r"input 0 of head: wanted integers .* of shape \(2, 4\), got 0 to 1000 of"):
        circuit.simulate("head", np.full((2, 4), 1000))
    with pytest.raises(ValueError, match=r"input 0 of head: wanted integers .* got 0 to 0 of shape \(3, 4\)"):
        circuit.simulate("head", np.zeros((3, 4), int))


def test_what_a_wrong_lookup_wraps_goes_on_as_a_ciphertext_does():
    """One in five lookups is one entry off. Past the end of a full table that is minus the entry at the other end, and
    the function that takes it has no room for it."""
    table, count = fhe.LookupTable(np.arange(4)), 300
    ends = [np.full(count, value) for value in range(4)]
    functions = {
        "first": fhe.Function(lambda ops, _, x: (ops.lookup(table, x),), [(x,) for x in ends]),
        "second": fhe.Function(
            lambda ops, _, y: (y + 3, ops.lookup(table, y)), [(x,) for x in ends], [[fhe.Output("first", 0)]]
        ),
    }
    circuit = fhe.get_backend(BACKEND).compile(functions, None, fhe.FHEConfig(0.2, "none"))
    keys = circuit.make_keys(seed=1)
    (state,) = circuit.simulate("first", ends[0])
    moved, again = circuit.simulate("second", state)
    assert np.array_equal(moved, state + 3)
    run = circuit.run("first", circuit.encrypt(keys, "first", ends[0]), keys.evaluation)
    (decrypted,) = circuit.decrypt(keys, "first", run)
    moved, onwards = circuit.decrypt(keys, "second", circuit.run("second", run, keys.evaluation))
    assert np.array_equal(moved, decrypted + 3)
    # One entry off to either side is 1 and -3: each came in 7 to 10% of 12,000 lookups. It is missing here with a
    # probability below 0.93**300, or 1e-9. Two entries off come now and then. At this p_error a number can also be
    # decrypted one off (2 of 3,000 to one side: half a step is 3 deviations), but not two off: 9 deviations.
    assert {0, 1, -3} <= set(state) and {0, 1, -3} <= set(decrypted)
    assert {*state, *decrypted, *again, *onwards} <= set(range(-4, 5))


def test_too_wide_a_lookup_says_where():
    def function(ops, params, x):
        with ops.tag("scores"):
            return (ops.lookup(params, x * 1000),)

    with pytest.raises(fhe.CompilationError, match="stage scores: a lookup on 17 bits") as info:
        compiled(function, fhe.LookupTable(np.arange(8)), samples((2,), -50, 50))
    assert "\n" not in str(info.value)
    # The next compilation works.
    assert compiled(RETURNS["one variable"], fhe.LookupTable(np.arange(8)), samples((2,), 0, 3)).report.pbs_count == 2


def test_too_wide_a_product_says_where():
    def function(ops, params, x):
        with ops.tag("scores"):
            return (ops.lookup(params, x) * (x * 2000),)

    with pytest.raises(fhe.CompilationError, match="the widest numbers are in stage scores: fewer bits there") as info:
        compiled(function, fhe.LookupTable(np.arange(8)), samples((2,), -50, 50))
    assert "\n" not in str(info.value)


def test_compiles_in_any_thread():
    table, results = fhe.LookupTable(np.arange(8)), []

    def function(ops, params, x):
        with ops.tag("output"):
            return (ops.lookup(params, x),)

    thread = threading.Thread(target=lambda: results.append(compiled(function, table, samples((2,), 0, 3))))
    thread.start()
    thread.join()
    assert results[0].report.pbs_by_stage == {"output": {2: 2}}


def test_cached_circuit_and_keys(head, tmp_path, monkeypatch):
    circuit, keys = head
    backend = fhe.get_backend(BACKEND)
    config = fhe.FHEConfig(P_ERROR, "none")
    functions = {"head": fhe.Function(tiny_head, INPUTSET)}
    fhe.compile_cached(backend, functions, PARAMS, config, tmp_path)
    monkeypatch.setattr(type(backend), "compile", None)
    again = fhe.compile_cached(backend, functions, PARAMS, config, tmp_path)
    assert again.id == circuit.id
    keys.save(tmp_path / f"{circuit.id}.keys")
    monkeypatch.setattr(type(circuit), "make_keys", None)
    assert fhe.cached_keys(again, tmp_path).evaluation == keys.evaluation
