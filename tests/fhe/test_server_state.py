"""Functions of one circuit that take each other's results: a small cache of keys and values on the server."""

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import fhe
from fhe.signatures import Signature, Signatures

NUMPY = fhe.NumpyOps()
# The tests look up fewer than 10,000 times: at this p_error one of them is wrong with a probability below 1e-6.
CONFIG = fhe.FHEConfig(p_error=1e-10, rounding="none")
BLOCKS = (1, 2)


@dataclass(frozen=True)
class Params:
    weights: np.ndarray  # (3, 4, 2): query, key, value
    narrow: fhe.LookupTable
    square: fhe.LookupTable
    exponential: fhe.LookupTable


PARAMS = Params(
    weights=np.random.default_rng(7).integers(-1, 2, (3, 4, 2)),
    narrow=fhe.LookupTable.build(lambda v: np.clip(v / 2, -2, 1), -8, 8),
    square=fhe.LookupTable.build(lambda v: v * v, -4, 5),
    exponential=fhe.LookupTable.build(lambda v: 3 * np.exp(v / 4 - 2), -8, 8),
)


def project(ops, params, x):
    """x (1, 4) -> query, key, value (1, 2) each, and the sum of the key's squares (1, 1)."""
    with ops.tag("project"):
        q, k, v = (ops.lookup(params.narrow, ops.matmul(x, weight)) for weight in params.weights)
        return q, k, v, ops.lookup(params.square, k).sum(axis=1, keepdims=True)


def attend(tokens, ops, params, q, *cached):
    """A query and, per token, key, value and the key's squares -> sum of 2 e v + v^2 (1, 2), and of e (1, 1)."""
    numerators = denominators = 0
    for k, v, squares in zip(cached[0::3], cached[1::3], cached[2::3], strict=True):
        with ops.tag("scores"):
            products = ops.lookup(params.square, q + k).sum(axis=1, keepdims=True) - squares  # 2 q k + q^2
        with ops.tag("softmax"):
            e = ops.lookup(params.exponential, products)
        with ops.tag("output"):
            numerators = numerators + ops.lookup(params.square, v + e) - ops.lookup(params.square, e)
            denominators = denominators + e
    return numerators, denominators


def total(ops, params, *parts):
    """Any number of equal arrays -> their sum."""
    return (functools.reduce(lambda a, b: a + b, parts),)


def functions(rng: Any = 0) -> dict[str, fhe.Function]:
    """project, attend to a block of 1 or 2 tokens, and the sums of two blocks' results."""
    rng = np.random.default_rng(rng)
    inputs = [(x.reshape(1, 4),) for x in np.array(list(itertools.product((-2, -1, 0, 1), repeat=4)))]
    projected = [project(NUMPY, PARAMS, *x) for x in inputs]
    made = {"project": fhe.Function(project, inputs)}
    results = []
    for tokens in BLOCKS:
        inputset = []
        for _ in range(600):
            query, *cached = (projected[i] for i in rng.integers(0, len(projected), tokens + 1))
            inputset.append((query[0], *itertools.chain.from_iterable(token[1:] for token in cached)))
        sources = [[fhe.Output("project", 0)]] + [[fhe.Output("project", i)] for i in (1, 2, 3)] * tokens
        run = functools.partial(attend, tokens)
        made[f"attend_{tokens}"] = fhe.Function(run, inputset, sources)
        results += [run(NUMPY, PARAMS, *sample) for sample in inputset]
    for position, name in enumerate(("numerators", "denominators")):
        parts = [result[position] for result in results]
        most, least = max(parts, key=np.max), min(parts, key=np.min)
        pairs = [(parts[i], parts[j]) for i, j in rng.integers(0, len(parts), (100, 2))]
        sources = [[fhe.Output(f"attend_{tokens}", position) for tokens in BLOCKS]] * 2
        made[name] = fhe.Function(total, [*pairs, (most, most), (least, least)], sources)
    return made


@pytest.fixture(scope="module", params=["clear", "concrete"])
def made(request):
    """A backend, the circuit, its keys."""
    if request.param == "concrete":
        pytest.importorskip("concrete.fhe", reason="needs the extra 'fhe'")
    backend = fhe.get_backend(request.param)
    fhe.register_functions(project, attend, total)
    circuit = backend.compile(functions(), PARAMS, CONFIG)
    return backend, circuit, circuit.make_keys()


class Session:
    """A client and its server. Tokens are read one by one; their keys and values stay on the server."""

    def __init__(self, circuit, keys):
        self.circuit, self.keys = circuit, keys
        self.tokens: list[tuple[np.ndarray, ...]] = []
        self.arrays: list[list[bytes]] = []

    def read(self, x):
        """Project one more token, in clear and encrypted."""
        self.tokens.append(project(NUMPY, PARAMS, x))
        sent = self.circuit.encrypt(self.keys, "project", x)
        self.arrays.append(self.circuit.run("project", sent, self.keys.evaluation))

    def attend(self, tokens):
        """Attention of the last token to some tokens: encrypted, and in clear."""
        name = f"attend_{len(tokens)}"
        cached = [array for token in tokens for array in self.arrays[token][1:]]
        clear = [array for token in tokens for array in self.tokens[token][1:]]
        results = self.circuit.run(name, [self.arrays[-1][0], *cached], self.keys.evaluation)
        return results, attend(len(tokens), NUMPY, PARAMS, self.tokens[-1][0], *clear)


def read_tokens(circuit, keys, count, seed=0):
    session = Session(circuit, keys)
    for x in np.random.default_rng(seed).integers(-2, 2, (count, 1, 4)):
        session.read(x)
    return session


def assert_same(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == np.int64
        assert np.array_equal(result, wanted), f"got {result.tolist()}, wanted {wanted.tolist()}"


def test_a_chain_of_calls_decrypts_to_the_clear_integers(made):
    """The last token attends to blocks of 1 and 2 tokens in any order, summed on the server."""
    _, circuit, keys = made
    session = read_tokens(circuit, keys, 4)
    for array, wanted in zip(session.arrays, session.tokens, strict=True):
        assert_same(circuit.decrypt(keys, "project", array), wanted)
    for blocks in ([[0, 1], [2, 3]], [[3], [0, 2]], [[1], [1]], [[2, 1], [0]]):
        parts, clear = zip(*(session.attend(block) for block in blocks), strict=True)
        for block, part, wanted in zip(blocks, parts, clear, strict=True):
            assert_same(circuit.decrypt(keys, f"attend_{len(block)}", part), wanted)
        for position, name in enumerate(("numerators", "denominators")):
            summed = circuit.run(name, [part[position] for part in parts], keys.evaluation)
            assert_same(circuit.decrypt(keys, name, summed), (clear[0][position] + clear[1][position],))


def test_every_function_simulates_to_numpys(made):
    _, circuit, _ = made
    for name, function in functions().items():
        for sample in function.inputset[:3]:
            assert_same(circuit.simulate(name, *sample), function.run(NUMPY, PARAMS, *sample))


def test_some_results_in_any_order(made):
    _, circuit, keys = made
    session = read_tokens(circuit, keys, 1)
    (arrays,), ((_, k, _, squares),) = session.arrays, session.tokens
    assert_same(circuit.decrypt(keys, "project", [arrays[3], arrays[1]]), (squares, k))
    assert circuit.decrypt(keys, "project", []) == ()


def test_two_runs_at_once(made):
    """Two texts in two threads."""
    _, circuit, keys = made
    sessions = [read_tokens(circuit, keys, 2, seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda session: session.attend([0, 1]), sessions * 2))
    for encrypted, wanted in results:
        assert_same(circuit.decrypt(keys, "attend_2", encrypted), wanted)


def test_arrays_in_the_wrong_place_are_refused(made):
    _, circuit, keys = made
    session = read_tokens(circuit, keys, 1)
    (arrays,) = session.arrays
    sent = circuit.encrypt(keys, "project", np.zeros((1, 4), int))
    q, k, v, squares = arrays
    for given, message in [
        ([q, v, k, squares], "expected output 1 of project, got output 2 of project"),
        ([*sent, k, v, squares], "expected output 0 of project, got input 0 of project"),
        ([q, k[:-1], v, squares], "output 1 of project are damaged or cut short"),
        ([q, b"", v, squares], "do not begin with"),
    ]:
        with pytest.raises(fhe.CircuitFormatError, match=message):
            circuit.run("attend_1", given, keys.evaluation)
    with pytest.raises(fhe.CircuitFormatError, match="expected input 0 of project, got output 0 of project"):
        circuit.run("project", [q], keys.evaluation)
    with pytest.raises(fhe.CircuitFormatError, match="got output 0 of attend_1"):
        circuit.run("denominators", [session.attend([0])[0][0]] * 2, keys.evaluation)
    with pytest.raises(fhe.CircuitFormatError, match="got output 0 of project"):
        circuit.decrypt(keys, "attend_1", [q])
    stranger = replace(keys, id="0" * 32)
    (foreign,) = circuit.encrypt(stranger, "project", np.zeros((1, 4), int))
    with pytest.raises(fhe.KeyMismatch, match="input 0 of project: made with keys"):
        circuit.run("project", [foreign], keys.evaluation)
    with pytest.raises(fhe.KeyMismatch, match="output 0 of project: made with keys"):
        circuit.decrypt(stranger, "project", arrays)


def test_unknown_functions_and_wrong_numbers_of_arrays(made):
    _, circuit, keys = made
    x = np.zeros((1, 4), int)
    with pytest.raises(ValueError, match=r"no function 'attend'.*there are: project, attend_1"):
        circuit.encrypt(keys, "attend", x)
    with pytest.raises(ValueError, match="no function 'attend'"):
        circuit.run("attend", [], keys.evaluation)
    with pytest.raises(ValueError, match="no function 'attend'"):
        circuit.decrypt(keys, "attend", [])
    with pytest.raises(ValueError, match="no function 'attend'"):
        circuit.simulate("attend", x)
    with pytest.raises(ValueError, match="the inputs of attend_1 are 4 arrays, not 1"):
        circuit.run("attend_1", circuit.encrypt(keys, "project", x), keys.evaluation)
    with pytest.raises(ValueError, match="the client's inputs of project are 1 arrays, not 2"):
        circuit.encrypt(keys, "project", x, x)
    with pytest.raises(ValueError, match="the inputs of project are 1 arrays, not 0"):
        circuit.simulate("project")
    assert circuit.encrypt(keys, "attend_1") == []  # all of its inputs come from other functions


def test_a_circuit_and_keys_from_disk(made, tmp_path):
    """They work with arrays of the original circuit."""
    backend, circuit, keys = made
    session = read_tokens(circuit, keys, 2)
    circuit.save(tmp_path / "circuit")
    keys.save(tmp_path / "keys")
    session.circuit = again = backend.load(tmp_path / "circuit")
    assert (again.id, again.report.functions) == (circuit.id, circuit.report.functions)
    session.keys = again.load_keys(tmp_path / "keys")
    encrypted, wanted = session.attend([1, 0])
    assert_same(again.decrypt(session.keys, "attend_2", encrypted), wanted)
    assert_same(circuit.decrypt(keys, "attend_2", encrypted), wanted)


def test_cached_circuit_and_keys(made, tmp_path, monkeypatch):
    backend, circuit, keys = made
    fhe.compile_cached(backend, functions(), PARAMS, CONFIG, tmp_path)
    monkeypatch.setattr(type(backend), "compile", None)
    again = fhe.compile_cached(backend, functions(), PARAMS, CONFIG, tmp_path)
    assert again.id == circuit.id
    keys.save(tmp_path / f"{circuit.id}.keys")
    assert fhe.cached_keys(again, tmp_path).evaluation == keys.evaluation


def test_the_id_of_a_circuit_depends_on_sources(made):
    backend, circuit, _ = made
    changed = functions()
    changed["numerators"] = replace(changed["numerators"], sources=[[fhe.Output("attend_1", 0)]] * 2)
    assert backend.compile(changed, PARAMS, CONFIG).id != circuit.id


def test_report(made):
    _, circuit, _ = made
    report = circuit.report
    assert {name: cost.pbs_count for name, cost in report.functions.items()} == {
        "project": 3 * 2 + 2,
        "attend_1": 2 + 1 + 2 + 1,
        "attend_2": 2 * (2 + 1 + 2 + 1),
        "numerators": 0,
        "denominators": 0,
    }
    stages = {stage: sum(widths.values()) for stage, widths in report.functions["attend_2"].pbs_by_stage.items()}
    assert stages == {"scores": 4, "softmax": 2, "output": 6}
    assert report.pbs_count == sum(cost.pbs_count for cost in report.functions.values())
    assert report.max_bit_width == max(cost.max_bit_width for cost in report.functions.values())
    clear = fhe.get_backend("clear").compile(functions(), PARAMS, CONFIG).report
    assert {name: cost.pbs_by_stage for name, cost in report.functions.items()} == {
        name: cost.pbs_by_stage for name, cost in clear.functions.items()
    }
    data = json.loads(json.dumps(report.to_json()))
    assert fhe.Report.from_json(data) == report
    assert data["functions"]["attend_1"]["pbs_count"] == report.functions["attend_1"].pbs_count


def test_functions_that_do_not_fit_together_are_refused():
    def refused(message, **changes):
        base = functions() | changes
        with pytest.raises(ValueError, match=message):
            fhe.get_backend("clear").compile(base, PARAMS, CONFIG)

    attend_1 = functions()["attend_1"]
    q, k, v, squares = attend_1.sources
    refused(
        "comes from nowhere, which is not a function", attend_1=replace(attend_1, sources=[[fhe.Output("nowhere")]])
    )
    refused("output 4 of project.*does not exist", attend_1=replace(attend_1, sources=[[fhe.Output("project", 4)]]))
    refused(r"input 0 of attend_1 has shape \(1, 2\).*\(1, 1\)", attend_1=replace(attend_1, sources=[squares]))
    refused("4 inputs, and sources for 5", attend_1=replace(attend_1, sources=[q, k, v, squares, q]))
    refused("must be an identifier", **{"attend to": attend_1})
    refused("input set of attend_1 is empty", attend_1=replace(attend_1, inputset=[]))
    with pytest.raises(ValueError, match="needs at least one function"):
        fhe.get_backend("clear").compile({}, PARAMS, CONFIG)


def test_on_concrete_a_result_for_another_function_comes_out_of_a_lookup():
    """The error says which one does not."""
    pytest.importorskip("concrete.fhe", reason="needs the extra 'fhe'")

    def shift(ops, params, x):
        return ops.lookup(params.square, x), ops.lookup(params.square, x) + x.sum(axis=1, keepdims=True)

    inputset = [(np.full((1, 2), value),) for value in (-2, 0, 1)]
    results = [shift(NUMPY, PARAMS, *sample) for sample in inputset]
    made = {"shift": fhe.Function(shift, inputset)}
    made["next"] = fhe.Function(total, [(r[1],) for r in results], [[fhe.Output("shift", 1)]])
    with pytest.raises(fhe.CompilationError, match="output 1 of shift is an input of next and contains input 0"):
        fhe.get_backend("concrete").compile(made, PARAMS, CONFIG)
    made["next"] = fhe.Function(total, [(r[0],) for r in results], [[fhe.Output("shift", 0)]])
    # The same lookup twice is one.
    assert fhe.get_backend("concrete").compile(made, PARAMS, CONFIG).report.pbs_count == 2


def test_on_concrete_a_result_for_another_function_must_be_used():
    pytest.importorskip("concrete.fhe", reason="needs the extra 'fhe'")

    def levels(ops, params, x):
        return ops.lookup(params.narrow, x), ops.lookup(params.exponential, x)

    def first(ops, params, x, y):
        return (ops.lookup(params.square, x),)

    sources = [[fhe.Output("levels", 0)], [fhe.Output("levels", 1)]]
    made = {
        "levels": fhe.Function(levels, [(np.arange(-2, 2),)]),
        "first": fhe.Function(first, [(np.array([-1, 0, 0, 1]), np.arange(4) % 2)], sources),
    }
    with pytest.raises(fhe.CompilationError, match="output 1 of levels cannot be input 1 of first: no result of first"):
        fhe.get_backend("concrete").compile(made, PARAMS, CONFIG)


def test_a_signed_result_for_an_unsigned_input():
    """When it runs, Concrete refuses a signed result for an unsigned input, so both get the same sign."""
    pytest.importorskip("concrete.fhe", reason="needs the extra 'fhe'")

    def square(ops, params, x):
        return (ops.lookup(params.square, x),)

    levels = fhe.Function(lambda ops, params, x: (ops.lookup(params.narrow, x),), [(np.arange(-4, 4),)])
    both = {
        name: fhe.Function(square, [(values,)], [[fhe.Output("levels")]])
        for name, values in {"signed": np.array([-2, -1, 0, 0, 1, 1, 0, 1]), "unsigned": np.array([0, 1] * 4)}.items()
    }
    circuit = fhe.get_backend("concrete").compile({"levels": levels} | both, PARAMS, CONFIG)
    keys = circuit.make_keys()
    x = np.array([0, 1, 2, 3, 2, 1, 0, 0])
    arrays = circuit.run("levels", circuit.encrypt(keys, "levels", x), keys.evaluation)
    for name in both:
        results = circuit.run(name, arrays, keys.evaluation)
        assert_same(circuit.decrypt(keys, name, results), (PARAMS.square(PARAMS.narrow(x)),))


def test_signatures_survive_json():
    signatures = Signatures({"f": Signature(((), (fhe.Output("g", 1), fhe.Output("f", 0))), 2), "g": Signature((), 2)})
    assert Signatures.from_json(json.loads(json.dumps(signatures.to_json()))) == signatures
