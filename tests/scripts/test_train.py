"""The training script: it learns, goes on where it was stopped, and refuses what would spoil a run."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("optax", reason="the train extra is not installed")
import cut_passages
import train
from train import END_OF_TEXT, TrainingConfig, TrainingError

RECIPE = TrainingConfig(
    vocab_size=280, n_positions=16, n_embd=16, n_layer=1, n_head=2, batch_size=4, learning_rate=3e-3,
    weight_decay=0.05, warmup_steps=5, decay_fraction=0.4, seed=0,
)  # fmt: skip


def write_corpus(directory: Path, documents: int) -> Path:
    random = np.random.default_rng(0)
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "home"])
    directory.mkdir(exist_ok=True)
    for split, count in (("train", documents), ("evaluation", 30), ("calibration", 30)):
        texts = [
            "\n\n".join(" ".join(random.choice(words, 12)).capitalize() + "." for _ in range(20)) for _ in range(count)
        ]
        (directory / f"{split}.txt").write_text(f"\n{END_OF_TEXT}\n".join(texts) + "\n")
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 1400)


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory) -> train.Data:
    return train.prepare_data(corpus, tmp_path_factory.mktemp("run"), RECIPE.vocab_size)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_like_one_that_was_not(data, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for directory in (whole, stopped):
        directory.mkdir()
    wanted = train.train(RECIPE, data, whole, steps=60, save_every=20)

    batches = train.batches

    def interrupted(*arguments):
        for count, batch in enumerate(batches(*arguments)):
            if count == 30:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(train, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(RECIPE, data, stopped, steps=60, save_every=20)
    monkeypatch.setattr(train, "batches", batches)
    got = train.train(RECIPE, data, stopped, steps=60, save_every=20)
    for name, tensor in wanted.items():
        assert np.array_equal(tensor, got[name]), name


@pytest.mark.slow
def test_training_learns_and_the_measure_says_so(data, tmp_path):
    config = RECIPE.model()
    before = train.train(RECIPE, data, tmp_path, steps=20, save_every=20)
    (tmp_path / "state.msgpack").unlink()
    after = train.train(RECIPE, data, tmp_path, steps=200, save_every=200)
    assert train.bits_per_byte(after, data, config) < train.bits_per_byte(before, data, config) - 0.3


def test_batches_depend_on_the_seed_and_the_step_alone(data):
    straight = [batch for batch, _ in zip(train.batches(data.train, RECIPE, 0), range(12), strict=False)]
    later = next(train.batches(data.train, RECIPE, 7))
    assert np.array_equal(straight[7], later)
    assert later.shape == (RECIPE.batch_size, RECIPE.n_positions + 1)


def test_the_tokenizer_gives_every_text_back(corpus):
    tokenizer = train.train_tokenizer(train.read_documents(corpus / "train.txt"), 280)
    for text in ("the cat sat.", "Ünïcode 漢字 \t\n tabs", " leading"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_export_is_a_model_that_loads(corpus, tmp_path):
    from jaxgpt2.models.gpt2.pretrained import GPT2

    options = ["--corpus", corpus, "--out", tmp_path / "run", "--steps", 20, "--save-every", 20, "--vocab-size", 280,
               "--context", 64, "--width", 16, "--layers", 1, "--heads", 2, "--batch-size", 2]  # fmt: skip
    exported = tmp_path / "model"
    result = CliRunner().invoke(train.main, [str(option) for option in [*options, "--export", exported]])
    assert result.exit_code == 0, result.output
    gpt2 = GPT2.from_pretrained(exported)
    assert len(list(gpt2.generate("the cat", 5))) <= 5
    # Another shape in the same run is refused, and nothing is touched.
    before = (tmp_path / "run" / "state.msgpack").read_bytes()
    result = CliRunner().invoke(train.main, [str(option) for option in [*options, "--seed", 1]])
    assert result.exit_code == 2
    assert "was started with seed=0, now 1" in result.output
    assert (tmp_path / "run" / "state.msgpack").read_bytes() == before
    # Passages of the exported tokenizer's tokens, from different documents.
    result = CliRunner().invoke(
        cut_passages.main,
        ["--corpus", str(corpus), "--checkpoint", str(exported), "--evaluation", "20", "--calibration", "20"],
    )
    assert result.exit_code == 0, result.output
    passages = (exported / "eval.txt").read_text().splitlines()
    assert len(passages) == 20
    assert all(8 <= len(gpt2.encode(passage)) <= 40 for passage in passages)
    assert not set(passages) & set((exported / "calibration.txt").read_text().splitlines())


def test_a_corpus_that_is_missing_or_too_small_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"train\.txt cannot be read .*build_corpus"):
        train.prepare_data(tmp_path / "nowhere", tmp_path, 280)
    with pytest.raises(TrainingError, match=r"characters, wanted 1,000,000 at least"):
        train.prepare_data(write_corpus(tmp_path / "small", 3), tmp_path, 280)
    assert not list(tmp_path.glob("*.npz"))


def test_a_run_with_another_runs_tokenizer_is_refused(corpus, tmp_path):
    train.prepare_data(corpus, tmp_path, 280)
    train.train_tokenizer(train.read_documents(corpus / "train.txt"), 270).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TrainingError, match="has 270 tokens, the run wants 280"):
        train.prepare_data(corpus, tmp_path, 280)
