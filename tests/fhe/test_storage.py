"""The server's half of a saved circuit: what is written comes back, and nothing that somebody else wrote is run."""

import dataclasses
import functools
import json
import subprocess
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fhe
from fhe import envelope, storage


@dataclasses.dataclass(frozen=True)
class Params:
    weight: Any
    table: Any = None

    def __post_init__(self):
        assert not isinstance(self.weight, str), "a class's own code runs"


class Pair(NamedTuple):
    first: Any
    second: Any


def body(ops, params, x):
    return (x,)


ARRAYS = st.sampled_from(
    [np.arange(6).reshape(2, 3), np.array(2.5), np.zeros((0, 2), np.int8), np.array([1 + 2j]), np.array(["ab", "c"])]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    LEAVES | ARRAYS | st.sampled_from([np.float32(0.1), np.int64(7), fhe.LookupTable(np.arange(3), low=-1, shift=2)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(LEAVES, inner, max_size=3)
        | st.tuples(inner.filter(lambda x: not isinstance(x, str)), inner).map(lambda pair: Params(*pair))
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.tuples(inner, inner).map(lambda pair: functools.partial(body, pair[0], x=pair[1]))
    ),
    max_leaves=8,
)


def round_trip(value: Any) -> Any:
    json_part, *arrays = storage._encode(value, check=True)
    return storage._decode(json.loads(json_part), [storage._from_npy(part) for part in arrays])


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, functools.partial):
        return a.func is b.func and same(a.args, b.args) and same(a.keywords, b.keywords)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@given(value=TREES)
def test_what_is_written_comes_back(value):
    fhe.register_functions(body)
    assert same(round_trip(value), value)
    assert storage.digest(value) == storage.digest(round_trip(value))


@given(value=TREES, other=TREES)
def test_a_digest_is_of_one_value(value, other):
    assert same(value, other) == (storage.digest(value) == storage.digest(other))


@pytest.mark.parametrize("value", [object(), types, len, np.array([object()]), {1, 2}, np.sum.__get__(1)])
def test_what_cannot_be_named_is_not_written(value, tmp_path):
    with pytest.raises(fhe.CompilationError, match="saved with the names of its functions"):
        storage.save(tmp_path, "test", "id", {}, value)
    assert not (tmp_path / storage.SERVER).exists()


def write_half(directory: Any, tree: Any, *arrays: bytes) -> None:
    parts = [tree if isinstance(tree, bytes) else json.dumps(tree).encode(), *arrays]
    (directory / storage.SERVER).write_bytes(envelope.pack("test", "id", "", parts))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"function": "os:system"}, "needs the function os:system, which is not here"),
        ({"function": "builtins:exec"}, "needs the function"),
        ({"partial": [{"function": "subprocess:run"}, {"tuple": []}, {"dict": []}]}, "needs the function"),
        ({"record": "subprocess:Popen", "fields": {"args": "true"}}, "needs the class"),
        ({"record": "nowhere.to.be.found:It", "fields": {}}, "needs the class"),
        ({"record": "test_storage:body", "fields": {}}, "needs the class"),
        ({"record": f"{__name__}:Params", "fields": {"weight": 1}}, "other fields"),
        ({"record": f"{__name__}:Params", "fields": {"weight": 1, "table": 2, "__class__": 3}}, "other fields"),
        ({"array": 0}, "lacks an array"),
        ({"array": -1}, "lacks an array"),
        ({"scalar": True}, "lacks an array"),
        ({"dict": [[{"list": []}, 1]]}, "damaged"),
        ({"dict": [[1]]}, "damaged"),
        ({"partial": [3, {"tuple": []}, {"dict": []}]}, "damaged"),
        ({"function": 5}, "no known kind"),
        ({"py/object": "os.system"}, "no known kind"),
        ([1], "no known kind"),
        (b"{", "damaged"),
        (b"\xff", "damaged"),
        (b'{"list": [' * 100_000, "damaged"),
    ],
)
def test_halves_that_somebody_else_wrote(tree, message, tmp_path):
    write_half(tmp_path, tree)
    with pytest.raises(fhe.CircuitFormatError, match=message):
        storage.load_half(tmp_path, "test", "id")


def test_arrays_that_are_none(tmp_path):
    for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"):
        write_half(tmp_path, {"array": 0}, data)
        with pytest.raises(fhe.CircuitFormatError, match="one of its arrays cannot be read"):
            storage.load_half(tmp_path, "test", "id")


def test_a_record_comes_back_without_its_classes_code(tmp_path):
    write_half(tmp_path, {"record": f"{__name__}:Params", "fields": {"weight": "text", "table": None}})
    half: Any = storage.load_half(tmp_path, "test", "id")
    assert half.weight == "text"


def test_another_process_knows_the_functions_of_all_methods():
    """And so can compute with a circuit from a file."""
    code = "import fhe.storage, jaxgpt2.methods; print(*(name.partition(':')[2] for name in fhe.storage._functions))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {
        "project_token",
        "attend",
        "first_token",
        "attend_to_text",
        "attend_in_layer",
        "prefill",
        "decode_step",
    } <= set(found.stdout.split())
