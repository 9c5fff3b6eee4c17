"""Byte-level BPE equals GPT-2's own, and belongs to the checkpoint it lies beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer

from helpers import END_OF_TEXT, REAL_TOKENIZER, one_line, save_byte_tokenizer
from jaxgpt2.models.gpt2.tokenizer import TokenizerError, load_tokenizer

GPT2_VOCAB = 50257
needs_real = pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason=f"{REAL_TOKENIZER} is not here")
any_text = st.text(max_size=80) | st.text("aeinrst 'ES\n\t.019é—中🙂", max_size=200)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(REAL_TOKENIZER, GPT2_VOCAB)


@pytest.fixture(scope="module")
def theirs() -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(REAL_TOKENIZER)


@needs_real
def test_known_tokens(ours: Tokenizer):
    assert ours.encode("Hello world").ids == [15496, 995]
    assert ours.encode(END_OF_TEXT).ids == [50256]
    assert ours.encode(f"Hello{END_OF_TEXT} world").ids == [15496, 50256, 995]
    assert ours.encode("").ids == []


@needs_real
@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_equals_transformers_and_goes_there_and_back(ours: Tokenizer, theirs: GPT2Tokenizer, text: str):
    ids = ours.encode(text).ids
    assert ids == theirs(text).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == text


@needs_real
@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_single_file_equals_the_pair(ours: Tokenizer, saved: Tokenizer, text: str):
    assert saved.encode(text).ids == ours.encode(text).ids


@pytest.fixture(scope="module")
def saved(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("saved")
    ours.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory, GPT2_VOCAB)


@needs_real
def test_reads_the_tokenizer_that_transformers_saves(theirs: GPT2Tokenizer, tmp_path: Path):
    theirs.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, GPT2_VOCAB).encode(f"Hello world{END_OF_TEXT}").ids == [15496, 995, 50256]


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_bytes_go_there_and_back(byte_tokenizer: Tokenizer, text: str):
    ids = byte_tokenizer.encode(text).ids
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) == len(text.encode())


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(directory)
    return load_tokenizer(directory, 257)


def test_more_embeddings_than_tokens_are_fine(tmp_path: Path):
    save_byte_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, 1000).get_vocab_size() == 257


def test_tokenizer_of_another_checkpoint(tmp_path: Path):
    save_byte_tokenizer(tmp_path)
    with one_line(TokenizerError, str(tmp_path), "256", "another checkpoint"):
        load_tokenizer(tmp_path, 256)


def test_no_tokenizer(tmp_path: Path):
    with one_line(TokenizerError, str(tmp_path), "tokenizer.json", "merges.txt"):
        load_tokenizer(tmp_path, 300)


def test_half_a_tokenizer(tmp_path: Path):
    save_byte_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with one_line(TokenizerError, "merges.txt"):
        load_tokenizer(tmp_path, 300)


@pytest.mark.parametrize("content", ["", "garbage", "[]", json.dumps({"model": {"type": "nothing"}}), "\x00"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_damaged_files(tmp_path: Path, name: str, content: str):
    save_byte_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with one_line(TokenizerError, str(tmp_path)):
        load_tokenizer(tmp_path, 300)


def test_merge_of_unknown_tokens(tmp_path: Path):
    save_byte_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot there\n")
    with one_line(TokenizerError, str(tmp_path)):
        load_tokenizer(tmp_path, 300)
