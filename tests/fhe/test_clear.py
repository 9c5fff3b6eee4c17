"""The interface, lookup tables, caches and the clear backend: all of `fhe` that needs no library of encryption."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pickle
import stat
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fhe
from fhe import cache, clear, envelope, registry
from fhe.tfhe.tracer import RangeTracer, lookup_slots

RNG = np.random.default_rng(0)
SQUARE = fhe.LookupTable.build(lambda v: v * v, -8, 7)
PARAMS = {
    "weight": RNG.integers(-3, 4, (4, 4)),
    "quarter": fhe.LookupTable.build(lambda v: v / 4, -6, 5, shift=2),
    "square": SQUARE,
}
INPUTSET = [(RNG.integers(-4, 4, (3, 4)),) for _ in range(20)]


def small_head(ops, params, x):
    """Every operation of `Ops` once."""
    with ops.tag("query"):
        q = ops.lookup(params["quarter"], ops.matmul(x, params["weight"]))  # (3, 4)
    with ops.tag("scores"):
        scores = ops.matmul(q, q.transpose((1, 0)))  # (3, 3)
    with ops.tag("softmax"):
        top = ops.max(scores, axis=-1, keepdims=True)  # (3, 1)
        both = ops.concatenate((q[:, :1] * q[:, 1:2], top), axis=1)  # (3, 2)
    return both, scores.sum(axis=-1, keepdims=False).reshape((1, 3))


def compiled(function: Any = small_head, params: Any = PARAMS, inputset: Any = INPUTSET, **changes: Any) -> Any:
    return fhe.get_backend("clear").compile(
        {"head": fhe.Function(function, inputset)}, params, fhe.FHEConfig(**changes)
    )


@given(
    values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=40),
    low=st.integers(-50, 50),
    shift=st.integers(0, 6),
    x=st.lists(st.integers(-5000, 5000), min_size=1, max_size=20),
)
def test_a_lookup_table_is_its_definition(values, low, shift, x):
    table = fhe.LookupTable(np.array(values), low, shift)
    naive = []
    for value in x:
        rounded = int(np.floor(value / 2**shift + 0.5)) if shift else value
        naive.append(values[min(max(rounded - low, 0), len(values) - 1)])
    assert table(np.array(x)).tolist() == naive
    assert table(np.array(x)).dtype == np.int64


def test_building_a_lookup_table():
    table = fhe.LookupTable.build(lambda v: v / 8, -2, 2, shift=2)
    assert table.values.tolist() == [-1, 0, 0, 0, 1]  # of -8, -4, 0, 4, 8: halves to even
    assert table.values.dtype == np.int32
    assert (table.low, table.shift) == (-2, 2)


@pytest.mark.parametrize(
    ("function", "low", "high", "shift", "message"),
    [
        (np.log, 0, 3, 0, "entry for input 0 is -inf"),
        (lambda v: v * 1e9, 0, 3, 0, "not an int32"),
        (lambda v: v, 3, 2, 0, "low <= high"),
        (lambda v: v, 0, 2, -1, "shift >= 0"),
        (lambda v: v[:1], 0, 2, 0, "keep the shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_functions_that_make_no_lookup_table(function, low, high, shift, message):
    with pytest.raises(ValueError, match=message):
        fhe.LookupTable.build(function, low, high, shift)


@pytest.mark.parametrize("changes", [{"p_error": 0.0}, {"p_error": 1.0}, {"rounding": "up"}])
def test_options_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        fhe.FHEConfig(**changes)


@settings(max_examples=200)
@given(
    low=st.integers(-200, 200),
    span=st.integers(0, 300),
    shift=st.integers(0, 5),
    rounding=st.sampled_from(["exact", "approximate", "none"]),
)
def test_a_lookup_has_room_for_its_range_and_its_rounding(low, span, shift, rounding):
    high = low + span
    first, bits = lookup_slots(low, high, shift, rounding)
    step = 1 if rounding == "none" else 1 << shift
    assert low - first * step >= 0  # unsigned
    last = ((1 << bits) - 1) * step
    assert high - first * step <= last if rounding == "approximate" else high - first * step < last + (step + 1) // 2
    assert bits != 4  # four become five
    assert 1 << (4 if bits == 5 else bits) <= max(2, 2 * (span // step + 2))  # no more than twice what is needed


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_a_maximum_is_one_lookup_per_comparison(size):
    x = np.random.default_rng(size).integers(-50, 50, (4, size))
    tracer = RangeTracer()
    assert np.array_equal(tracer.max(tracer.mark(x), axis=1), x.max(1))
    assert np.array_equal(tracer.max(tracer.mark(x), axis=-2, keepdims=True), x.max(0, keepdims=True))
    assert sum(record.count for record in tracer.records if record.kind == "lookup") == 4 * (size - 1) + 3 * size


def test_report_counts_by_stage():
    report = compiled().report
    counts = {stage: sum(widths.values()) for stage, widths in report.pbs_by_stage.items()}
    # query: 12 lookups and 2 bits rounded away; scores: 2 for each of 9 x 4 products; softmax: 3 x 2 comparisons
    # and 3 products.
    assert counts == {"query": 12 * 3, "scores": 72, "softmax": 12}
    assert report.pbs_count == sum(counts.values()) == sum(report.pbs_by_bit_width.values())
    assert report.max_bit_width == max(report.pbs_by_bit_width)
    assert compiled(rounding="approximate").report.pbs_count == report.pbs_count - 24
    assert report.estimated_run_seconds > 0


def test_report_survives_json():
    report = compiled().report
    data = json.loads(json.dumps(report.to_json()))
    assert fhe.Report.from_json(data) == report
    assert {"pbs_count", "max_bit_width", "complexity", "p_error", "evaluation_key_bytes", "pbs_by_stage"} <= set(data)


def test_round_trip():
    circuit = compiled()
    keys = circuit.make_keys()
    for sample in INPUTSET[:3]:
        expected = small_head(fhe.NumpyOps(), PARAMS, *sample)
        decrypted = circuit.decrypt(
            keys, "head", circuit.run("head", circuit.encrypt(keys, "head", *sample), keys.evaluation)
        )
        for results in (circuit.simulate("head", *sample), decrypted):
            assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_inputs_and_input_sets_are_checked():
    with pytest.raises(ValueError, match="shapes"):
        compiled().simulate("head", np.zeros((2, 4), int))
    with pytest.raises(ValueError, match="input set of head is empty"):
        compiled(inputset=[])
    with pytest.raises(ValueError, match="mixes shapes"):
        compiled(inputset=[*INPUTSET, (np.zeros((2, 4), int),)])


def test_keys_belong_to_one_circuit(tmp_path):
    circuit = compiled()
    other = compiled(params=PARAMS | {"a": 1})
    keys, stranger = circuit.make_keys(), circuit.make_keys()
    ciphertexts = circuit.encrypt(keys, "head", *INPUTSET[0])
    with pytest.raises(fhe.KeyMismatch, match="circuit"):
        other.encrypt(keys, "head", *INPUTSET[0])
    with pytest.raises(fhe.KeyMismatch, match="keys"):
        circuit.run("head", ciphertexts, stranger.evaluation)
    with pytest.raises(fhe.KeyMismatch, match="keys"):
        circuit.decrypt(stranger, "head", circuit.run("head", ciphertexts, keys.evaluation))
    keys.save(tmp_path / "keys")
    with pytest.raises(fhe.KeyMismatch, match="circuit"):
        other.load_keys(tmp_path / "keys")


def test_key_files_are_private_and_whole(tmp_path):
    circuit = compiled()
    path = tmp_path / "keys"
    keys = circuit.make_keys()
    keys.save(path)
    keys.save(path)  # again, over the old one
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys"]
    assert circuit.load_keys(path) == keys
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(fhe.CircuitFormatError, match="damaged or cut short"):
        circuit.load_keys(path)
    path.write_bytes(b"hello")
    with pytest.raises(fhe.CircuitFormatError, match="do not begin with"):
        circuit.load_keys(path)
    with pytest.raises(fhe.CircuitFormatError, match="cannot read"):
        circuit.load_keys(tmp_path / "absent")


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_any_flipped_byte_is_detected(position, flip):
    data = bytearray(envelope.pack("results", "circuit", "keys", [b"one", b"", b"three"]))
    assert envelope.unpack(bytes(data), "results", "circuit", "keys") == ("keys", "results", [b"one", b"", b"three"])
    data[position % len(data)] ^= flip
    with pytest.raises(fhe.CircuitFormatError):
        envelope.unpack(bytes(data), "results", "circuit", "keys")


def test_saved_circuit(tmp_path):
    fhe.register_functions(small_head)
    circuit = compiled()
    circuit.save(tmp_path / "circuit")
    loaded = fhe.get_backend("clear").load(tmp_path / "circuit")
    assert (loaded.id, loaded.report) == (circuit.id, circuit.report)
    assert np.array_equal(loaded.simulate("head", *INPUTSET[0])[0], circuit.simulate("head", *INPUTSET[0])[0])
    with pytest.raises(fhe.CircuitFormatError, match="cannot read"):
        fhe.get_backend("clear").load(tmp_path)
    (tmp_path / "circuit" / "circuit.json").write_text("[]")
    with pytest.raises(fhe.CircuitFormatError, match="damaged"):
        fhe.get_backend("clear").load(tmp_path / "circuit")
    nameless = compiled(lambda ops, params, x: (x,), None)
    with pytest.raises(fhe.CompilationError, match="saved with the names of its functions"):
        nameless.save(tmp_path)


def test_the_clients_half_of_a_saved_circuit(tmp_path):
    circuit = compiled()
    circuit.save(tmp_path, server=False)
    client = fhe.get_backend("clear").load(tmp_path)
    assert (client.id, client.report, client.signatures) == (circuit.id, circuit.report, circuit.signatures)
    keys = client.make_keys()
    results = circuit.run("head", client.encrypt(keys, "head", *INPUTSET[0]), keys.evaluation)
    expected = small_head(fhe.NumpyOps(), PARAMS, *INPUTSET[0])
    assert all(np.array_equal(a, b) for a, b in zip(client.decrypt(keys, "head", results), expected, strict=True))
    for computing in (
        lambda: client.run("head", client.encrypt(keys, "head", *INPUTSET[0]), keys.evaluation),
        lambda: client.simulate("head", *INPUTSET[0]),
        lambda: client.save(tmp_path),
    ):
        with pytest.raises(fhe.NoWeights, match="without its weights"):
            computing()


@pytest.mark.parametrize("name", ["clear", "ckks"])
def test_a_client_never_opens_the_servers_file(name, tmp_path):
    """Whoever hands a circuit to a client must not be able to run code there."""
    if name == "ckks":
        pytest.importorskip("tenseal", reason="the CKKS engine is optional")
    backend = fhe.get_backend(name)
    x = np.arange(4096) % 4
    circuit = backend.compile({"double": fhe.Function(double, [(x,)])}, None, fhe.FHEConfig())
    fhe.register_functions(double)
    circuit.save(tmp_path)  # both halves
    client = backend.load(tmp_path, server=False)
    with pytest.raises(fhe.NoWeights):
        client.simulate("double", x)

    marker = tmp_path / "marker"
    kind = {"clear": clear.KIND, "ckks": "CKKS circuit"}[name]
    bomb = envelope.pack(kind, circuit.id, "", [pickle.dumps(Bomb(str(marker)))])
    circuit.save(tmp_path / "client", server=False)
    (tmp_path / "client" / "server.bin").write_bytes(bomb)
    client = backend.load(tmp_path / "client", server=False)
    keys = client.make_keys()
    results = circuit.run("double", client.encrypt(keys, "double", x), keys.evaluation)
    # No coefficient's noise is beyond 21, and encoding rounds it by half: in a slot all 8192 of them, twice, by 2**40.
    assert np.abs(client.decrypt(keys, "double", results)[0] - 2 * x).max() < 2 * 8192 * 21.5 / 2**40 + 1e-9
    assert not marker.exists()
    with pytest.raises(fhe.CircuitFormatError, match="damaged"):
        backend.load(tmp_path / "client")
    assert not marker.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(pickle.dumps(Bomb(str(marker))))
    assert marker.exists()  # the bomb is one


def double(ops, params, x):
    return (ops.add(x, x) if hasattr(ops, "add") else x + x,)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@given(content=st.binary(max_size=200), header=st.one_of(st.none(), st.binary(max_size=80)))
def test_a_right_checksum_does_not_open_an_envelope(content, header):
    """A checksum proves nothing about the sender: the content must be checked as well."""
    body = envelope.MAGIC + (struct.pack("<I", len(header)) + header if header is not None else b"") + content
    with pytest.raises(fhe.CircuitFormatError):
        envelope.unpack(body + hashlib.sha256(body).digest(), "results", "circuit", "keys")


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [1]},
        {"sizes": [4]},
        {"sizes": [-1, 4]},
        {"sizes": 3},
        {"sizes": [2, "1"]},
        {"keys": None},
        {"kind": []},
    ],
)
def test_headers_that_do_not_fit(changes):
    header = json.dumps({"kind": "results", "circuit": "c", "keys": "k", "sizes": [3]} | changes).encode()
    body = envelope.MAGIC + struct.pack("<I", len(header)) + header + b"abc"
    with pytest.raises(fhe.CircuitFormatError):
        envelope.unpack(body + hashlib.sha256(body).digest(), "results", "c", "k")


@given(content=st.binary(max_size=200))
def test_bytes_that_are_not_an_array(content):
    circuit = compiled()
    keys = circuit.make_keys(1)
    (array,) = circuit.signatures.pack_inputs("head", circuit.id, keys.id, [b"\x93NUMPY" + content])
    with pytest.raises(fhe.CircuitFormatError):
        circuit.run("head", [array], keys.evaluation)


class CountingBackend(clear.ClearBackend):
    """A backend from elsewhere, which counts its compilations."""

    name = "counting"
    compilations = 0

    def compile(self, functions, params, config):
        self.compilations += 1
        return super().compile(functions, params, config)


def test_a_third_backend(monkeypatch):
    monkeypatch.setattr(registry._registry, "factories", dict(registry._registry.factories))
    fhe.register_backend("counting", CountingBackend)
    assert fhe.backends() == ("ckks", "clear", "concrete", "counting")
    assert isinstance(fhe.get_backend("counting"), CountingBackend)
    with pytest.raises(ValueError, match="exists already"):
        fhe.register_backend("counting", CountingBackend)
    fhe.register_backend("counting", CountingBackend, replace=True)


def test_unknown_backend():
    with pytest.raises(fhe.UnknownBackend, match="unknown backend 'seal'; known: ckks, clear, concrete"):
        fhe.get_backend("seal")


def test_circuits_are_cached(tmp_path, caplog):
    backend = CountingBackend()

    def make(params=PARAMS, inputset=INPUTSET, rounding: Any = "exact", name="head"):
        functions = {name: fhe.Function(small_head, inputset)}
        return fhe.compile_cached(backend, functions, params, fhe.FHEConfig(rounding=rounding), tmp_path)

    first = make()
    assert make().id == first.id
    assert backend.compilations == 1
    make(params=PARAMS | {"weight": PARAMS["weight"] + 1})
    make(params=PARAMS | {"square": dataclasses.replace(SQUARE, low=-7)})
    make(inputset=INPUTSET[1:])
    make(rounding="none")
    make(name="other")
    assert backend.compilations == 6
    assert len(list(tmp_path.iterdir())) == 6  # no temporary directory is left
    for entry in tmp_path.glob("*/server.bin"):
        entry.write_bytes(entry.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="fhe.cache"):
        make()
    assert "compiling again" in caplog.text
    make()
    assert backend.compilations == 7


def test_the_fingerprint_includes_what_a_function_closes_over():
    def make(factor):
        return lambda ops, params, x: (x * factor,)

    def fingerprint(function):
        functions = {"head": fhe.Function(function, INPUTSET)}
        return cache.fingerprint(CountingBackend(), functions, None, fhe.FHEConfig())

    assert fingerprint(make(2)) == fingerprint(make(2)) != fingerprint(make(3))
    with pytest.raises(TypeError, match="cannot hash a object"):
        fingerprint(make(object()))


def test_keys_are_cached(tmp_path, caplog):
    circuit = compiled()
    directory = tmp_path / "keys"
    keys = fhe.cached_keys(circuit, directory)
    assert fhe.cached_keys(circuit, directory) == keys
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (path,) = directory.iterdir()
    path.write_bytes(b"")
    assert fhe.cached_keys(circuit, directory) != keys
    assert "making new keys" in caplog.text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import fhe; print('concrete' in sys.modules)", "False"),
        (
            "sys.modules['concrete'] = None\nimport fhe\ntry: fhe.get_backend('concrete')\n"
            "except fhe.BackendUnavailable as error: print(error)",
            "the backend 'concrete' needs concrete-python, which cannot be imported",
        ),
    ],
)
def test_concrete_is_optional(code, expected):
    result = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    assert expected in result.stdout
    assert result.stdout.count("\n") == 1
