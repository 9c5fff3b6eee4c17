"""Linear layers in integers: the same ones whoever computes them, and close to the float model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import linears
from fhe import CompilationError
from helpers import one_line, random_checkpoint
from jaxgpt2.errors import InputError
from jaxgpt2.evaluation import bundled_passages, evaluate_linear
from jaxgpt2.linear import LinearGPT2, Products, fingerprint
from jaxgpt2.methods import linear
from jaxgpt2.methods.linear import LinearBits
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble
from jaxgpt2.serving.linear_bundle import write_bundles
from jaxgpt2.serving.masked import LocalOwner, Masked
from jaxgpt2.serving.remote import Connection, RemoteOwner
from linears import PASSAGES, recorded
from served import running


@pytest.fixture(scope="module")
def model(linear_gpt2) -> LinearGPT2:
    return linear_gpt2


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> Any:
    with contextlib.closing(linears.prepared_store(model, tmp_path_factory.mktemp("store"))) as store:
        yield store


@pytest.fixture(scope="module")
def remote_owner(model, tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("bundles")
    write_bundles(model, directory / "out", {})
    with running(directory / "out" / "server", directory / "state") as server:
        owner = RemoteOwner(Connection(server.url), model.client.shapes)
        owner.check(model.client.identity)
        with contextlib.closing(owner.connection):
            yield owner


# --- integers -------------------------------------------------------------------------------------


def test_integers_are_equal_whoever_computes_them(model, store, remote_owner):
    """JAX, masks in this process, masks over HTTP: every product of prefill and decoding, and the logits."""
    prompt = np.array([model.client.encode("one dog")])
    steps = [np.pad(prompt, ((0, 0), (0, 1))), np.array([[7]]), np.array([[200]])]

    def read(products: Products) -> tuple[list[tuple[str, np.ndarray]], list[np.ndarray]]:
        found, logits = [], []
        cache = model.client.empty_cache(1, 16)
        for step in steps:
            count = min(step.shape[1], prompt.shape[1])
            answer, cache = model.client.forward(step, recorded(products, found), cache, count)
            logits.append(np.asarray(answer))
        return found, logits

    count = prompt.shape[1] + 2
    wanted, logits = read(model.products())
    assert len(wanted) == 3 * 4 * 2
    assert all(y.dtype == np.int32 and np.abs(y).max() > 1000 for _, y in wanted)
    for owner in (LocalOwner(model.weights), remote_owner):
        found, others = read(Masked(model.client, owner, store.claim(count)))
        assert [name for name, _ in found] == [name for name, _ in wanted]
        for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
            assert np.array_equal(ours, theirs)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(others, logits, strict=True))


def test_whole_texts_are_equal_whoever_computes_them(model, store, remote_owner):
    tokens = np.array([model.client.encode(PASSAGES[0])])
    wanted, _ = model.client.forward(tokens, model.products())
    assert wanted.shape == (1, tokens.shape[1], 300)
    for owner in (LocalOwner(model.weights), remote_owner):
        found, _ = model.client.forward(tokens, Masked(model.client, owner, store.claim(tokens.shape[1])))
        assert np.array_equal(found, wanted)


def test_texts_are_equal_whoever_computes_them(model, store, remote_owner):
    wanted = linears.quantized_tokens(model, "zebras", 5)
    needed = model.client.masks_needed("zebras", 5)
    assert needed == 10
    for owner in (LocalOwner(model.weights), remote_owner):
        masked = Masked(model.client, owner, store.claim(needed))
        assert list(model.client.generate("zebras", 5, masked)) == wanted


def test_more_tokens_than_masks_are_not_sent(model, store):
    owner = LocalOwner(model.weights)
    masked = Masked(model.client, owner, store.claim(2))
    tokens = np.array([[1, 2, 3]])
    owner.online = lambda *_: pytest.fail("sent")  # type: ignore
    with one_line(InputError, "masks for 3 tokens are needed, and 2 were claimed"):
        model.client.forward(tokens, masked)
    with one_line(InputError, "were claimed"):  # nor the rest under masks that are out of step
        model.client.forward(tokens[:, :1], masked)


def test_padding_changes_nothing(model):
    """A text alone, padded, and in a batch with a longer one; in a cache with room for more."""

    def close(found: Any, wanted: Any) -> bool:
        """Floats of other shapes may round otherwise, and then single integers do."""
        return float(np.linalg.norm(found - wanted)) < 1e-2 * float(np.linalg.norm(wanted))

    client, products = model.client, model.products()
    tokens = np.array([client.encode("two dogs")])
    wanted, _ = client.forward(tokens, products)
    for junk in (0, 299):
        padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=junk)
        found, _ = client.forward(padded, products, count=tokens.shape[1])
        assert close(found, wanted[:, -1:])
        both, _ = client.forward(np.concatenate([padded, padded[:, ::-1]]), products)
        assert close(both[:1, : tokens.shape[1]], wanted)
        for size in (16, 32):
            found, cache = client.forward(padded, products, client.empty_cache(1, size), tokens.shape[1])
            assert close(found, wanted[:, -1:])
            assert cache is not None and cache.length == tokens.shape[1]


# --- close to the float model ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_layer_norms_fold_into_matrices(gpt2, tmp_path, tied):
    """With wide integers hardly anything is left but what folding does."""
    if not tied:
        random_checkpoint(
            tmp_path, n_inner=48, tie_word_embeddings=False, activation_function="silu",
            scale_attn_by_inverse_layer_idx=True,
        )  # fmt: skip
        gpt2 = GPT2.from_pretrained(tmp_path)
    tensors = {name: np.asarray(tensor) for name, tensor in disassemble(gpt2.model).items()}
    ones = {name: np.ones(len(tensors[f"{name}.weight"]), np.float32) for name in _names(gpt2)}
    bits = LinearBits(12, 16)
    quantized = linear.quantize(gpt2.config, tensors, bits, ones)
    client = LinearGPT2.quantize(gpt2, PASSAGES, LinearBits(4, 8)).client
    wide = type(client)(gpt2.config, gpt2.tokenizer, quantized.client, bits, "")
    model = LinearGPT2(wide, quantized.weights)
    tokens = np.array([gpt2.encode("the cat sat on a mat and zebras")])
    wanted = np.asarray(gpt2(tokens))
    found, _ = wide.forward(tokens, model.products())
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert (np.argmax(found, -1) == np.argmax(wanted, -1)).all()


def _names(gpt2: GPT2) -> list[str]:
    return linear.matrix_names(gpt2.config)


@pytest.mark.slow
def test_the_bundled_model_at_default_widths():
    gpt2 = GPT2.from_pretrained("tiny")
    model = LinearGPT2.quantize(gpt2, bundled_passages("calibration")[:60])
    measured = evaluate_linear(gpt2, model.client, model.products(), bundled_passages("eval")[:30], ks=(1, 5))
    assert measured.passages == 30
    assert 0 < measured.kl <= 1e-4
    assert measured.top_k[1] >= 0.99
    assert measured.top_k[5] >= measured.top_k[1]
    assert measured.perplexity == pytest.approx(measured.perplexity_float, rel=1e-3)
    assert 2 < measured.perplexity_float < 100
    for report in model.reports().values():
        assert report.failure_log2 < -64 and report.largest_sum < 2**31


# --- matrices -------------------------------------------------------------------------------------


def test_features_that_are_far_larger_than_others_do_not_set_the_scale_of_all(gpt2, monkeypatch):
    """Two channels of every layer's values a hundred times as large, and made up for behind them: the same function."""
    tensors = {name: np.array(tensor) for name, tensor in disassemble(gpt2.model).items()}
    width = gpt2.config.n_embd
    for layer in range(gpt2.config.n_layer):
        for feature in (1, width // 2):
            tensors[f"h.{layer}.attn.c_attn.weight"][:, 2 * width + feature] *= 100
            tensors[f"h.{layer}.attn.c_attn.bias"][2 * width + feature] *= 100
            tensors[f"h.{layer}.attn.c_proj.weight"][feature] /= 100
    parts = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    uneven = GPT2(gpt2.config, assemble(gpt2.config, parts), gpt2.tokenizer)

    def kl() -> float:
        model = LinearGPT2.quantize(uneven, PASSAGES, LinearBits(8, 8))
        return evaluate_linear(uneven, model.client, model.products(), PASSAGES, (1,)).kl

    smooth = kl()
    monkeypatch.setattr(linear, "smoothing_for", lambda largest, weight: np.ones(len(weight), np.float32))
    assert smooth < kl() / 3


def test_quantization_is_deterministic(gpt2, model):
    again = LinearGPT2.quantize(gpt2, PASSAGES)
    assert again.client.identity == model.client.identity == fingerprint(model.weights)
    other = LinearGPT2.quantize(gpt2, PASSAGES, LinearBits(9, 12))
    assert other.client.identity != model.client.identity


def test_quantized_matrices_by_hand():
    weight = np.array([[1.0, 0.0, -2.0], [0.5, 0.0, 1.0], [-0.26, 0.0, 0.0]])
    integers, scale = linear.quantize_matrix(weight, 3)
    assert integers.dtype == np.int16
    assert integers.tolist() == [[3, 0, -3], [2, 0, 2], [-1, 0, 0]]  # ties to even
    assert scale == pytest.approx([1 / 3, 1e-30 / 3, 2 / 3])
    found, scales = linear.quantize_matrix(weight.copy(order="F"), 3)
    assert np.array_equal(found, integers) and np.array_equal(scales, scale)


@pytest.mark.parametrize(
    ("weights", "inputs", "part"),
    [(1, 12, "weights"), (13, 12, "weights"), (0, 12, "weights"), (10, 1, "inputs"), (10, 17, "inputs")],
)
def test_bits_out_of_range(weights, inputs, part):
    with one_line(InputError, f"bits of {part} of linear layers must be 2 to"):
        LinearBits(weights, inputs)


@pytest.fixture(scope="module")
def broad(tmp_path_factory) -> GPT2:
    """A model with columns of 1,024 weights."""
    directory = tmp_path_factory.mktemp("broad")
    random_checkpoint(directory, n_layer=1, n_inner=1024)
    return GPT2.from_pretrained(directory)


def test_sums_that_leave_int32(broad):
    with one_line(CompilationError, "(1024, 32)", "must stay below 2,147,483,648", "inputs reach 32,767", "fewer bits"):
        LinearGPT2.quantize(broad, PASSAGES, LinearBits(10, 16))


def test_batches_that_could_fail(broad):
    with one_line(CompilationError, "(1024, 32)", "more than 2**-64", "has norm", "fewer bits"):
        LinearGPT2.quantize(broad, PASSAGES, LinearBits(12, 2))


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31) + 1, 0, -1])
def test_products_are_exact_to_the_end_of_int32(value):
    """A float64 product, cut to int32."""
    weight = np.array([[value // 1000], [value - 1000 * (value // 1000)]], np.int64)
    x = jnp.asarray([[[1000, 1]]], jnp.int32)
    assert int(linear.product(x, linear.prepared(weight))[0, 0, 0]) == value


def test_the_clients_half_has_no_matrix(model, tmp_path: Path):
    write_bundles(model, tmp_path / "out", {})
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(tmp_path / "out" / "client" / "client.safetensors")
    assert {name for name, tensor in tensors.items() if tensor.ndim > 1} == {"wte", "wpe"}
