"""The measures of DESIGN: agreement, KL, the ablated head's KL, recovered KL, head error."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import helpers
from jaxgpt2.calibration import HiddenStates
from jaxgpt2.decoding import Cached, OutOfRange
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.errors import InputError, PromptError
from jaxgpt2.evaluation import check_disjoint, divergence, evaluate, measure, read_passages
from jaxgpt2.methods import MethodConfig
from jaxgpt2.models.gpt2.pretrained import GPT2
from jaxgpt2.modules import Module
from jaxgpt2.quantize import Bits

# The tokenizer of the random models has a token a byte.
CALIBRATION = ["the cat", "sat on", "a mat", "one dog", "ran after", "two", "it was", "not the", "zebras", "xylem"] * 4
TEXT = ["the dog", "a", "it ran", "two cats", "mat"] * 4


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory) -> EncryptedGPT2:
    directory = tmp_path_factory.mktemp("three-heads")
    helpers.random_checkpoint(directory, n_embd=24, n_head=3)
    gpt2 = GPT2.from_pretrained(directory)
    return EncryptedGPT2.encrypt(gpt2, "0.1", MethodConfig.of("lowrank", Bits.of(3))).calibrate(CALIBRATION, 8)


def test_measures_equal_their_definitions(encrypted):
    """Against a plain loop over passages, without padding or batches."""
    runner = encrypted.runner("quantized")
    measured = evaluate(encrypted, TEXT, runner, (1, 2, 5))
    kl = kl_ablated = error = norm = 0.0
    agree = {1: 0, 2: 0, 5: 0}
    positions = 0
    for text in TEXT:
        tokens = np.array([encrypted.model.encode(text)], np.int32)
        reference, quantized, ablated = (encrypted.forward(tokens, e) for e in ("float", runner, "ablated"))
        p, q, a = (scipy.special.log_softmax(np.asarray(t.logits[0], np.float64), axis=-1)
                   for t in (reference, quantized, ablated))  # fmt: skip
        kl += float((np.exp(p) * (p - q)).sum())
        kl_ablated += float((np.exp(p) * (p - a)).sum())
        for k in agree:
            agree[k] += sum(best in np.argsort(-row)[:k] for best, row in zip(p.argmax(axis=-1), q, strict=True))
        error += float(((quantized.contributions - reference.contributions) ** 2).sum())
        norm += float((reference.contributions**2).sum())
        positions += tokens.size
    assert measured.positions == positions
    assert measured.passages == len(TEXT)
    assert measured.kl == pytest.approx(kl / positions, rel=1e-3, abs=1e-7)
    assert measured.kl_ablated == pytest.approx(kl_ablated / positions, rel=1e-3, abs=1e-7)
    assert measured.recovered_kl == pytest.approx(1 - kl / kl_ablated, rel=1e-2)
    assert measured.head_error == pytest.approx(np.sqrt(error / norm), rel=1e-3)
    assert measured.top_k == pytest.approx({k: count / positions for k, count in agree.items()})


def test_an_average_head_is_what_evaluation_measures_without_each(encrypted):
    gpt2 = encrypted.model
    heads = [f"{layer}.{head}" for layer in range(gpt2.config.n_layer) for head in range(3)]
    found = []
    for head in heads:
        alone = EncryptedGPT2.encrypt(gpt2, head, MethodConfig.of("softmax", 8)).calibrate(CALIBRATION, 8)
        found.append(evaluate(alone, TEXT[:16], alone.runner("quantized")).kl_ablated)
    assert HiddenStates.read(gpt2, TEXT[:16], 8).average_head(gpt2) == pytest.approx(np.mean(found), rel=1e-3)


def test_the_float_model_is_perfect_and_the_ablated_one_is_worth_nothing(encrypted):
    perfect = evaluate(encrypted, TEXT, "float")
    assert perfect.top_k[1] == 1.0
    assert perfect.recovered_kl == pytest.approx(1.0, abs=1e-4)
    assert perfect.head_error == 0.0
    nothing = evaluate(encrypted, TEXT, "ablated")
    assert nothing.recovered_kl == pytest.approx(0.0, abs=1e-6)
    assert nothing.head_error == pytest.approx(1.0)
    assert nothing.top_k == nothing.top_k_ablated


@pytest.mark.slow
def test_circuits_give_the_same_evaluation(encrypted):
    compiled = encrypted.compile(CALIBRATION, 8, backend="clear")
    in_jax = evaluate(encrypted, TEXT[:4], encrypted.runner("quantized"))
    simulated = evaluate(compiled, TEXT[:4], compiled.runner("simulate"))
    assert simulated.kl == pytest.approx(in_jax.kl, rel=1e-3)
    assert simulated.head_error == pytest.approx(in_jax.head_error, rel=1e-4)


def test_long_passages_are_cut_where_a_length_is_given(encrypted):
    runner = encrypted.runner("quantized")
    cut = evaluate(encrypted, ["one cat sat", "a"], runner, max_tokens=5)
    short = evaluate(encrypted, ["one c", "a"], runner)  # a token a byte
    assert cut.positions == 6
    assert cut.kl == pytest.approx(short.kl, rel=1e-4)


def test_kl_is_never_negative():
    """Logits that differ by roundings: what cancels in the sum of p (log p - log q) is of either sign."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(400, 3000)).astype(np.float32) * 4
    for size in (0.0, 1e-7, 1e-6, 1e-4, 1e-2, 0.1, 1.0):
        other = (logits + size * random.normal(size=logits.shape)).astype(np.float32)
        p, q = (scipy.special.log_softmax(x.astype(np.float64), axis=-1) for x in (logits, other))
        found = np.asarray(divergence(*(jnp.asarray(x, jnp.float32) for x in (p, q))))
        assert (found >= 0).all()
        wanted = (np.exp(p) * (p - q)).sum(axis=-1)
        # float32 keeps log probabilities of up to 40 to 2e-6.
        assert np.allclose(found, wanted, rtol=1e-3, atol=1e-10 + 4e-6 * np.sqrt(wanted.max()))


@pytest.fixture
def refusing(encrypted, monkeypatch) -> EncryptedGPT2:
    """Compiled, and its client refuses whatever is decrypted of a text of three tokens."""
    read = Cached.read

    def refuse(self, client, executor, x, cache, length):
        if len(x) == 3:
            raise OutOfRange("sums of attention weights are too small")
        return read(self, client, executor, x, cache, length)

    monkeypatch.setattr(Cached, "read", refuse)
    return encrypted.compile(CALIBRATION, 8, backend="clear")


@pytest.mark.slow
def test_refused_texts_are_counted_and_left_out(refusing, encrypted):
    texts = ["the dog", "mat", "it ran", "cat"]
    runners = {"quantized": encrypted.runner("quantized"), "simulate": refusing.runner("simulate")}
    found = measure(refusing, texts, runners, (1,))
    assert list(found.refused["simulate"]) == [1, 3]
    assert "module 0.1: sums of attention" in found.refused["simulate"][1]
    wanted = evaluate(encrypted, ["the dog", "it ran"], encrypted.runner("quantized"), (1,))
    for name in runners:  # both columns are of the same texts
        measured = found.evaluation(name)
        assert (measured.positions, measured.passages) == (13, 2)
        assert measured.kl == pytest.approx(wanted.kl, rel=1e-3)
        assert measured.kl_ablated == pytest.approx(wanted.kl_ablated, rel=1e-3)
        assert measured.head_error == pytest.approx(wanted.head_error, rel=1e-3)
    assert [found.evaluation(name).refused for name in runners] == [0, 2]
    with pytest.raises(OutOfRange, match=r"passage 2 is refused: module 0\.1: sums"):
        evaluate(refusing, texts, refusing.runner("simulate"), (1,), strict=True)
    with pytest.raises(OutOfRange, match=r"all passages are refused, the first: module 0\.1"):
        evaluate(refusing, ["mat", "cat"], refusing.runner("simulate"), (1,))


@pytest.mark.slow
def test_a_text_that_one_module_refuses_reaches_no_later_one(refusing):
    two = dataclasses.replace(
        refusing,
        configs={Module(layer, 1): refusing.configs[Module(0, 1)] for layer in range(2)},
        quantized={Module(layer, 1): refusing.quantized[Module(0, 1)] for layer in range(2)},
        circuits={Module(layer, 1): refusing.circuits[Module(0, 1)] for layer in range(2)},
    )
    found = measure(two, ["the dog", "mat"], {"simulate": two.runner("simulate")}, (1,))
    assert found.refused["simulate"].keys() == {1}
    assert np.isfinite(found.evaluation("simulate").kl)


def test_refusals_are_foreseen_in_jax(encrypted):
    """Of a method that says what it refuses; its texts are computed all the same."""
    runner = encrypted.runner("quantized")
    function = dataclasses.replace(
        encrypted.function(Module(0, 1)), refuses=lambda _, results: results[1][:, 0] == results[1][2, 0]
    )
    runner = dataclasses.replace(runner, functions={Module(0, 1): function})
    found = measure(encrypted, ["a", "it", "the dog"], {"": runner}, (1,))
    assert set(found.refused[""]) == {2}  # the third row of padding refuses no text
    assert found.evaluation("").passages == 3
    assert found.evaluation("").refused == 1


@pytest.mark.parametrize(
    ("passages", "ks", "message"),
    [
        ([], (1,), "no passages"),
        (["a", ""], (1,), "empty"),
        (["one cat sat"], (1,), "11 tokens, the modules are made for 8"),
        (["the cat " * 40], (1,), "context is"),
        (["a"], (0,), "every k must be 1 to"),
        (["a"], (), "every k must be 1 to"),
    ],
)
def test_what_cannot_be_evaluated(encrypted, passages, ks, message):
    with pytest.raises(InputError, match=message):
        evaluate(encrypted, passages, encrypted.runner("quantized"), ks)


def test_evaluation_text_must_not_be_calibration_text():
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(PromptError, match="1 passages are in the calibration text"):
        check_disjoint(["a", "b "], ["c", "b"])


def test_passages_are_read_one_a_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree\n")
    assert read_passages(path) == ["one two", "three"]
    for content, message in ((b"", "is empty"), (b"one\n\ntwo\n", "line 2: empty passage"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(PromptError, match=message):
            read_passages(path)
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_passages(tmp_path / "missing")
