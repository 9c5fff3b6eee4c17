"""Prompts as token ids, checked."""

from __future__ import annotations

from tokenizers import Tokenizer

from jaxgpt2.errors import PromptError


def encode(tokenizer: Tokenizer, text: str, context: int, room: int = 0) -> list[int]:
    """Token ids of a text that leaves `room` tokens of a context free.

    Raises:
        PromptError: an empty text, one that is not Unicode, or one that does not fit.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as bytes that are not UTF-8 become on a command line
        raise PromptError("the prompt is not valid Unicode text") from None
    tokens = tokenizer.encode(text).ids
    if not tokens:
        raise PromptError("the prompt is empty: give at least one character")
    if len(tokens) + room > context:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens and {room} more are asked for, but the model's context is "
            f"{context}: shorten one of them"
        )
    return tokens
