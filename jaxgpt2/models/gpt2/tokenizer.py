"""GPT-2's byte-level BPE, through the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxgpt2.errors import InputError

END_OF_TEXT = "<|endoftext|>"


class TokenizerError(InputError):
    """A tokenizer that is missing, damaged, or not the one that a checkpoint was trained with."""


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a checkpoint: `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Args:
        directory: the checkpoint's.
        vocab_size: the model's; every token must have an embedding.

    Raises:
        TokenizerError: no tokenizer, one that cannot be read, or one with tokens that the model does not know.
    """
    single, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if single.exists():
            tokenizer = Tokenizer.from_file(str(single))
        elif vocab.exists() and merges.exists():
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])
        else:
            raise TokenizerError(f"{directory} has no tokenizer.json, nor vocab.json and merges.txt")
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"the tokenizer in {directory} cannot be read: {reason}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest < 0:  # the library skips entries of vocab.json that it does not understand
        raise TokenizerError(f"the tokenizer in {directory} has no tokens")
    if largest >= vocab_size:
        raise TokenizerError(
            f"the tokenizer in {directory} has token ids up to {largest}, but the model knows {vocab_size} tokens: "
            "it belongs to another checkpoint"
        )
    return tokenizer
