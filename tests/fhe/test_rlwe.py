"""The engine `fhe.rlwe`: products against big integers, bytes against SEAL, noise against its bound, hostile bytes."""

import math
import subprocess
import sys
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhe import BackendUnavailable, CircuitFormatError, CompilationError, InsecureParameters, KeyMismatch, rlwe
from fhe.rlwe import client, verify
from fhe.rlwe.product import EXACT, recombine

PARAMETERS = rlwe.Parameters()
Q = PARAMETERS.coeff_modulus
N = PARAMETERS.poly_modulus_degree
T = 2**32


def filled(pattern: str, shape: tuple[int, ...], low: int, high: int, seed: int) -> npt.NDArray[np.int64]:
    """Integers from low to high, both included, all of them the worst or random."""
    if pattern == "random":
        return np.random.default_rng(seed).integers(low, high, shape, np.int64, endpoint=True)
    out = np.full(shape, low if pattern == "low" else high, np.int64)
    if pattern == "both":
        out.reshape(-1)[1::2] = low
    return out


patterns = st.sampled_from(["high", "low", "both", "random"])


def big(array: npt.NDArray[Any]) -> npt.NDArray[np.object_]:
    """The same numbers as Python's."""
    return array.astype(object)


def some_masks(features: int, seed: int = 0) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, T, (features, N), np.uint32)


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["numpy", "jax"])
@given(st.data())
def test_ahead_is_exact(array: Any, data: st.DataObject) -> None:
    # JAX compiles for every shape: there it is one.
    inputs, outputs = (40, 3) if array == "jax" else (data.draw(st.integers(1, 127)), data.draw(st.integers(1, 40)))
    columns = 5 if array == "jax" else data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 2**32))
    weights = filled(data.draw(patterns), (inputs, outputs), 1 - 2**15, 2**15 - 1, seed)
    residues = filled(data.draw(patterns), (inputs, columns), 0, Q - 1, seed + 1).astype(np.uint64)
    matrix = rlwe.Matrix(weights, array=array)
    wanted = big(weights).T.dot(big(residues)) % Q
    blocks = list(matrix.ahead(residues, rows=3))
    assert all(len(block) <= 3 for block in blocks)
    assert (np.concatenate(blocks) == wanted).all()
    assert (matrix.ahead_by_columns(residues, columns=2 if array == "numpy" else columns) == wanted).all()


def test_blocks_leave_jax_as_it_was() -> None:
    import jax.numpy as jnp

    blocks = rlwe.Matrix(np.ones((3, 4), np.int8), array="jax").ahead(np.ones((3, 2), np.uint64), rows=2)
    next(blocks)
    assert jnp.ones(1, float).dtype == jnp.float32
    next(blocks)


@given(st.lists(st.integers(1 - EXACT, EXACT - 1), min_size=1, max_size=8), st.integers(1 - EXACT, EXACT - 1))
def test_recombination_at_its_limits(lows: list[int], high: int) -> None:
    low = np.array([*lows, EXACT - 1, 1 - EXACT, 0, -1])
    for other in (high, EXACT - 1, 1 - EXACT):
        found = recombine(np, low.astype(np.float64), np.full(len(low), float(other)), PARAMETERS)
        assert [int(x) for x in found] == [(int(x) + other * 2**26) % Q for x in low]


@given(st.integers(1, 127), st.integers(1, 20), st.integers(1, 3), patterns, patterns, st.integers(0, 2**32))
def test_online_is_exact(inputs: int, outputs: int, rows: int, left: str, right: str, seed: int) -> None:
    weights = filled(left, (inputs, outputs), 1 - 2**15, 2**15 - 1, seed)
    masked = filled(right, (rows, inputs), 0, T - 1, seed + 1).astype(np.uint32)
    assert (rlwe.Matrix(weights).online(masked) == big(masked).dot(big(weights)) % T).all()
    # Centred, 2**31 is the largest magnitude.
    masked[:] = 2**31
    assert (rlwe.Matrix(weights).online(masked) == big(masked).dot(big(weights)) % T).all()


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_one_time_pad(inputs: int, outputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = filled("random", (inputs, outputs), -511, 511, seed)
    x = rng.integers(-2047, 2048, (2, inputs), np.int32)
    matrix, mask = rlwe.Matrix(weights), rng.integers(0, T, (2, inputs), np.uint32)
    masked = x.view(np.uint32) + mask
    assert ((matrix.online(masked) - matrix.online(mask)).view(np.int32) == x @ weights).all()


def test_matrix_refuses_what_is_not_exact() -> None:
    with pytest.raises(CompilationError, match="below 32768"):
        rlwe.Matrix(np.array([[2**15]]))
    with pytest.raises(CompilationError, match="integers"):
        rlwe.Matrix(np.array([[0.5]]))  # type: ignore
    with pytest.raises(CompilationError, match=r"column 1 .* sum to 4,194,304.*fewer bits"):
        rlwe.Matrix(np.stack([np.full(2**12, 1), np.full(2**12, 2**10)], axis=1))
    matrix = rlwe.Matrix(np.ones((3, 2), np.int8))
    with pytest.raises(ValueError, match="uint32"):
        matrix.online(np.zeros((1, 3), np.int32))  # type: ignore
    with pytest.raises(ValueError, match="uint64"):
        matrix.ahead(np.zeros((2, 4), np.uint64))


# --- masks --------------------------------------------------------------------------------------


def test_masks() -> None:
    seeds = [bytes([number]) * 32 for number in range(5)]
    first = rlwe.masks(seeds, 7, 100)
    assert first.shape == (100, 5)
    assert (first == rlwe.masks(seeds, 7, 100)).all()
    assert (first[:, 3] == rlwe.mask(seeds[3], 7, 100)).all()
    assert (first[:40] == rlwe.masks(seeds, 7, 40)).all()
    # Of 1,000 numbers of 32 bits, two would be equal by chance once in 8,000 times; seeds are fixed.
    others = np.concatenate([first, rlwe.masks(seeds, 8, 100)])
    assert len(np.unique(others)) == others.size
    assert len({rlwe.new_seed() for _ in range(10)}) == 10


def test_masks_are_chacha20() -> None:
    """RFC 8439, section 2.4.2: key 00..1f, nonce 000000000000004a00000000, the second block, as its block 1."""
    stream = rlwe.mask(bytes(range(32)), 0x4A << 56, 32)
    assert stream[16:].tobytes().hex().startswith("224f51f3401bd9e12fde276fb8631ded8c131f823d2c06")


@pytest.mark.parametrize(("seed", "number"), [(bytes(31), 0), (bytes(32), -1), (bytes(32), 2**64)])
def test_masks_refuse(seed: bytes, number: int) -> None:
    with pytest.raises(ValueError):
        rlwe.mask(seed, number, 4)


# --- bounds -------------------------------------------------------------------------------------


def test_parameters() -> None:
    assert (Q - 1) % (2 * N) == 0
    assert all(Q % 2**bits == 1 for bits in PARAMETERS.dropped_bits)  # so that rounding never wraps
    assert (PARAMETERS.feature_bytes, PARAMETERS.output_bytes) == (28672, 22528)
    with pytest.raises(InsecureParameters):
        rlwe.Parameters(1024)
    with pytest.raises(InsecureParameters):
        rlwe.Parameters(coeff_modulus=2**54 - 77823)


def test_bound_of_failure() -> None:
    rng = np.random.default_rng(0)
    # 10 bits of the weights of a trained matrix: about normal, the largest of 3,072 at four deviations.
    usual = np.clip(np.rint(rng.normal(0, 128, (3072, 64))), -511, 511).astype(np.int16)
    report = rlwe.check_matrix(usual, 100)
    assert report.failure_log2 < -200
    assert report.largest_sum == 100 * np.abs(usual.astype(int)).sum(axis=0).max()
    # The same by hand, for one column of 768 times 511.
    half_step = 2**11
    proxy = 10.75 * 768 * 511**2 + 2048 * 8**2
    x = Q / 2**33 - 0.5 - half_step - 768 * 511 * 2**-33
    by_hand = 1 - x**2 / (2 * proxy) / math.log(2) + 11
    assert rlwe.check_matrix(np.full((768, 1), 511), 1).failure_log2 == pytest.approx(by_hand)
    # More columns, a larger norm: more failures.
    assert rlwe.check_matrix(np.full((768, 4), 511), 1).failure_log2 == pytest.approx(by_hand + 2)


def test_refused_matrices() -> None:
    with pytest.raises(CompilationError, match=r"\(3072, 2\) could be wrong with probability 2\*\*-.*column 1"):
        rlwe.check_matrix(np.stack([np.full(3072, 100), np.full(3072, 511)], axis=1), 1)
    with pytest.raises(CompilationError, match=r"probability 2\*\*0\.0"):  # no room at all
        rlwe.check_matrix(np.full((3072, 2), 2**15 - 1), 1)
    with pytest.raises(CompilationError, match="may reach 2,147,483,648 and must stay below 2,147,483,648"):
        rlwe.check_matrix(np.full((2**10, 1), -(2**5)), 2**16)
    assert rlwe.check_matrix(np.full((2**10, 1), -(2**5)), 2**16 - 1).largest_sum == 2**31 - 2**15


# --- bytes --------------------------------------------------------------------------------------


def test_requests_hold_every_residue() -> None:
    residues = np.random.default_rng(0).integers(0, Q, (5, 2 * N), np.uint64)
    residues[0, :3] = 0, Q - 1, 2**32
    data = rlwe.pack_request(residues, PARAMETERS)
    assert len(data) == 5 * PARAMETERS.feature_bytes
    assert data[7:14] == (Q - 1).to_bytes(7, "little")
    assert (rlwe.unpack_request(data, 5, PARAMETERS) == residues).all()


def test_answers_are_rounded_to_the_nearest() -> None:
    residues = np.random.default_rng(0).integers(0, Q, (3, 2 * N), np.uint64)
    ends = np.array([0, 1, 7, 8, 9, 2047, 2048, 2049, Q - 1, Q - 2, Q - 8, Q - 9, Q - 2048, Q - 2049, Q - 2050])
    residues[1, : len(ends)] = residues[1, N : N + len(ends)] = ends
    data = rlwe.pack_answer(residues, PARAMETERS)
    assert len(data) == 3 * PARAMETERS.output_bytes
    found = rlwe.unpack_answer(data, 3, PARAMETERS)
    assert found.max() < Q
    distance = found.astype(np.int64) - residues.astype(np.int64)
    for half, bits in zip(np.split(distance, 2, axis=1), PARAMETERS.dropped_bits, strict=True):
        assert np.abs(half).max() == 2 ** (bits - 1)  # and so no wrap, at either end


@pytest.mark.parametrize("change", ["short", "long", "empty", "residue"])
@pytest.mark.parametrize("what", ["request", "answer"])
def test_hostile_bytes(what: str, change: str) -> None:
    unpack = {"request": rlwe.unpack_request, "answer": rlwe.unpack_answer}[what]
    size = {"request": PARAMETERS.feature_bytes, "answer": PARAMETERS.output_bytes}[what]
    good = bytes(2 * size)
    last_word = {"request": Q.to_bytes(7, "little"), "answer": ((Q >> 4) + 1).to_bytes(6, "little")}[what]
    data = {
        "short": good[:-1],
        "long": good + b"\0",
        "empty": b"",
        "residue": good[: -len(last_word)] + last_word,
    }[change]
    unpack(good, 2, PARAMETERS)
    with pytest.raises(CircuitFormatError, match=what):
        unpack(data, 2, PARAMETERS)


def test_matrix_refuses_hostile_requests_before_it_answers() -> None:
    with pytest.raises(CircuitFormatError):
        rlwe.Matrix(np.ones((3, 2), np.int8)).answer(bytes(PARAMETERS.feature_bytes))


# --- SEAL ---------------------------------------------------------------------------------------


@pytest.fixture
def seal() -> Any:
    return pytest.importorskip("tenseal.sealapi", reason="encryption needs tenseal")


def plaintext(seal: Any, numbers: npt.NDArray[np.uint32]) -> Any:
    """SEAL's own plaintext of a few coefficients."""
    return seal.Plaintext(" + ".join(f"{int(n):X}x^{i}" for i, n in reversed(list(enumerate(numbers))) if n))


def test_the_modulus_is_prime(seal: Any) -> None:
    assert seal.Modulus(Q).is_prime()


def test_bytes_of_seal_both_ways(seal: Any) -> None:
    """SEAL encrypts, we read and write, SEAL loads and decrypts; and it finds nothing changed."""
    context = client.context(PARAMETERS)
    keys = client._Keys.generate(context)
    reader, file = client._Reader(PARAMETERS), client._File(3 * 8 * N)
    for numbers in (some_masks(1)[0], np.array([5, 0, T - 1, 0, 0], np.uint32)):
        fresh, loaded, found = seal.Ciphertext(), seal.Ciphertext(), seal.Plaintext()
        keys.encryptor.encrypt_symmetric(plaintext(seal, numbers), fresh)
        saved = bytes(file.save(fresh))
        residues, head = reader.ciphertext(memoryview(saved)), reader.head(memoryview(saved))
        assert int(residues[0]) == fresh.data(0)
        file.load(loaded, context, head, residues)
        again = reader.ciphertext(file.save(loaded))
        assert (again == residues).all()
        keys.decryptor.decrypt(loaded, found)
        decrypted = reader.plaintext(file.save(found))
        assert len(decrypted) <= N
        assert (decrypted == np.trim_zeros(numbers, "b")).all()
    file.close()


def test_our_sum_is_seals_encryption(seal: Any) -> None:
    """With one seed for both, SEAL's encryption of masks is its encryption of zero plus what we add to it."""
    context = client.context(PARAMETERS, seed=1)
    keys = client._Keys.generate(context)
    reader, file = client._Reader(PARAMETERS), client._File(3 * 8 * N)
    masks = some_masks(1)
    masks[0, :4] = 0, 1, T - 1, T // 2
    theirs, zero = seal.Ciphertext(), seal.Ciphertext()
    keys.encryptor.encrypt_symmetric(plaintext(seal, masks[0]), theirs)
    wanted = reader.ciphertext(file.save(theirs))
    keys.encryptor.encrypt_zero_symmetric(zero)
    ours = reader.ciphertext(file.save(zero)).copy()
    ours[:N] = (ours[:N] + client.encode(masks, PARAMETERS)[0]) % np.uint64(Q)
    assert (ours == wanted).all()
    file.close()


@given(st.lists(st.integers(0, T - 1), min_size=1))
def test_encoding_is_rounding(numbers: list[int]) -> None:
    found = client.encode(np.array(numbers, np.uint32), PARAMETERS)
    assert [int(x) for x in found] == [(Q * n + T // 2) // T for n in numbers]


def test_noise_is_what_the_bound_assumes(seal: Any) -> None:
    """Decrypted modulo q - 1, an encryption of zero is its noise.

    What is expected: a centred binomial, 42 coins, never beyond 21, variance 10.5. Of n = 65,536 numbers:
    - the mean is off by more than 0.1 with a probability of 2 exp(-n 0.01 / 21), below 2**-43 (Chernoff);
    - e**2 has variance 10.5**2 (2 - 1 / 10.5), below 211, and is at most 441: by Bernstein, its mean is off by more
      than 0.5 with a probability of 2 exp(-n 0.125 / (211 + 441 / 6)), below 2**-40.
    Seeds are fixed, so this only says how likely any seeds are to pass.
    """
    noise = []
    for seed in range(32):
        settings = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        settings.set_poly_modulus_degree(N)
        settings.set_coeff_modulus([seal.Modulus(Q)])
        settings.set_plain_modulus(seal.Modulus(Q - 1))
        settings.set_random_generator(seal.Blake2xbPRNGFactory([seed] * 8))
        context = seal.SEALContext(settings, True, seal.SEC_LEVEL_TYPE.TC128)
        keys = client._Keys.generate(context)
        zero, found = seal.Ciphertext(), seal.Plaintext()
        keys.encryptor.encrypt_zero_symmetric(zero)
        keys.decryptor.decrypt(zero, found)
        file = client._File(3 * 8 * N)
        values = np.zeros(N, np.int64)
        read = client._Reader(PARAMETERS).plaintext(file.save(found)).astype(np.int64)
        file.close()
        values[: len(read)] = read
        noise.append(np.where(values > Q // 2, values - (Q - 1), values))
    numbers = np.concatenate(noise)
    assert numbers.size == 65536
    assert np.abs(numbers).max() <= rlwe.parameters.NOISE_TERMS
    assert abs(numbers.mean()) < 0.1
    assert abs((numbers**2).mean() - rlwe.parameters.NOISE_VARIANCE) < 0.5


def test_end_to_end(seal: Any) -> None:
    """The worst weights of 10 bits that the bound admits for 768 inputs, and some others."""
    inputs = 768
    weights = np.zeros((inputs, 6), np.int16)
    weights[:, 0], weights[:, 1] = 511, -511
    weights[:, 2] = np.where(np.arange(inputs) % 2, 511, -511)
    weights[:, 3] = np.random.default_rng(0).integers(-511, 512, inputs)
    weights[5, 4] = 1  # and a column of zeros
    assert rlwe.check_matrix(weights, 2047).failure_log2 < -64
    masks = rlwe.masks([rlwe.new_seed() for _ in range(N)], 3, inputs)
    with rlwe.ClientBatch() as batch:
        request = batch.encrypt(masks)
        assert len(request) == inputs * PARAMETERS.feature_bytes
        matrix = rlwe.Matrix(weights)
        answer = b"".join(matrix.answer(request, rows=4))
        found = batch.decrypt(answer, 6)
    assert (found == matrix.online(np.ascontiguousarray(masks.T)).T).all()
    assert (found[0] == masks.sum(axis=0, dtype=np.uint64) * 511 % T).all()


def test_a_request_can_be_streamed(seal: Any) -> None:
    """Nothing is multiplied: SEAL's noise is 21 at most, rounding adds 2**11 and 2048 times 8: below 2**19, surely."""
    masks = some_masks(40)
    with rlwe.ClientBatch() as batch:
        blocks = list(batch.encrypt_blocks(masks))
        assert len(blocks) > 1
        residues = rlwe.unpack_request(b"".join(blocks), 40, PARAMETERS)
        assert (batch.decrypt(rlwe.pack_answer(residues, PARAMETERS), 40) == masks).all()


def test_a_batch_is_used_once(seal: Any) -> None:
    masks = some_masks(1)
    batch = rlwe.ClientBatch()
    with pytest.raises(ValueError, match="uint32"):
        batch.encrypt(masks.astype(np.int64))  # type: ignore
    with pytest.raises(ValueError, match="2048"):
        batch.encrypt(masks[:, 1:])
    request = batch.encrypt(masks)
    with pytest.raises(KeyMismatch, match="already"):
        batch.encrypt(masks)
    # Bytes that are no answer are no use of the key.
    with pytest.raises(CircuitFormatError):
        batch.decrypt(b"", 1)
    answer = rlwe.pack_answer(rlwe.unpack_request(request, 1, PARAMETERS), PARAMETERS)
    assert (batch.decrypt(answer, 1) == masks).all()
    with pytest.raises(KeyMismatch, match="erased"):
        batch.decrypt(answer, 1)
    batch.erase()


def test_keys_and_randomness_are_fresh(seal: Any) -> None:
    """The same masks twice in one batch and in another: of 2**14 residues two are equal once in 2**25 times."""
    masks = np.repeat(some_masks(1), 2, axis=0)
    requests = []
    for _ in range(2):
        with rlwe.ClientBatch() as batch:
            requests.append(rlwe.unpack_request(batch.encrypt(masks), 2, PARAMETERS))
    residues = np.concatenate(requests)
    assert len(np.unique(residues)) == residues.size


# --- verification -------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), patterns, patterns, st.integers(0, 2**32), st.data())
def test_verifier(inputs: int, outputs: int, left: str, right: str, seed: int, data: st.DataObject) -> None:
    weights = filled(left, (inputs, outputs), -511, 511, seed).astype(np.int16)
    x = filled(right, (3, inputs), -2047, 2047, seed + 1).astype(np.int32)
    y = (x.astype(np.int64) @ weights).astype(np.int32)
    verifier = rlwe.Verifier((weights[start : start + 7] for start in range(0, inputs, 7)), outputs)
    assert verifier.check(x, y)
    # A single wrong number goes unseen only if its u is zero, once in 2**61.
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, outputs - 1))
    y[row, column] += data.draw(st.integers(1, 2**20))
    assert not verifier.check(x, y)


@given(patterns, st.integers(1, 50), st.integers(0, 2**32))
def test_verifiers_arithmetic(pattern: str, terms: int, seed: int) -> None:
    rows = filled(pattern, (2, terms), -(2**31), 2**31 - 1, seed).astype(np.int32)
    numbers = filled(pattern, (terms,), 0, verify.PRIME - 1, seed + 1).astype(np.uint64)
    found = verify._dot(rows, verify._limbs(numbers))
    assert [int(x) for x in found] == list(big(rows).dot(big(numbers)) % verify.PRIME)


def test_verifier_refuses() -> None:
    with pytest.raises(ValueError, match="32 bits"):
        rlwe.Verifier([np.ones((2, 2), np.int64)], 2)
    with pytest.raises(ValueError, match="outputs"):
        rlwe.Verifier([], 2**16 + 1)


# --- libraries ----------------------------------------------------------------------------------


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, fhe, fhe.rlwe\n"
        "print(sorted({'tenseal', 'jax', 'cryptography', 'zstandard', 'jaxgpt2'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("tenseal.sealapi", lambda: rlwe.ClientBatch()),
        ("zstandard", lambda: rlwe.ClientBatch()),
        ("cryptography.hazmat.primitives.ciphers", lambda: rlwe.mask(bytes(32), 0, 1)),
        ("jax.numpy", lambda: rlwe.Matrix(np.ones((1, 1), np.int8), array="jax")),
    ],
)
def test_missing_libraries(missing: str, use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.context.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    parent, _, name = missing.rpartition(".")
    if isinstance(sys.modules.get(parent), types.ModuleType):
        monkeypatch.delattr(sys.modules[parent], name, raising=False)
    with pytest.raises(BackendUnavailable, match=f"'rlwe' needs {missing.split('.')[0]}"):
        use()
