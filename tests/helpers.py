"""Random GPT-2s in Hugging Face's format, made by transformers itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other are slow on a busy machine

END_OF_TEXT = "<|endoftext|>"
REAL_TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "gpt2-tokenizer"

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "eos_token_id": None,
    "bos_token_id": None,
}


def save_byte_tokenizer(directory: Path) -> None:
    """A byte-level BPE without a merge: a token for every byte, in GPT-2's two files, and the end of text (256)."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab[END_OF_TEXT] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def random_checkpoint(
    directory: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config: Any
) -> transformers.GPT2LMHeadModel:
    """Saves a random GPT-2 and a tokenizer in a directory, and returns transformers' model.

    Every parameter is random, biases and layer norms too, and large enough for the layers to matter; the positions are
    larger still, so that greedy text does not repeat one token.
    """
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SMALL, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 1.5 if name.endswith("wpe.weight") else 0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_byte_tokenizer(directory)
    return model


def torch_logits(model: transformers.GPT2LMHeadModel, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(ids)).logits.float().numpy()


def rewrite_tensors(directory: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Stores `model.safetensors` again with tensors replaced or added, or taken out where given as None.

    Names are with `__` for `.`, as in `h__0__ln_1__weight`.
    """
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)
    return tensors


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@contextlib.contextmanager
def one_line(error: type[Exception], *parts: str) -> Iterator[None]:
    """Expects an error whose message is one line that contains these parts."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message and "\n" not in message
    for part in parts:
        assert part in message
