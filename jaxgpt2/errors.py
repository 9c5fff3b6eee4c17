"""The base of every error that a wrong input causes, and those that several parts share."""


def shown(message: str) -> str:
    """One line that is not endless, and of which nothing moves the cursor of a terminal, whatever is in it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())[:1000]


class InputError(ValueError):
    """Something a person gave cannot be used. The message is one line: what was wanted, what came, what to do."""


class PromptError(InputError):
    """Text that the model cannot take: nothing at all, or more than fits its context."""


class MissingExtra(InputError):
    """A library that an optional extra installs."""

    def __init__(self, error: ImportError, what: str, extra: str):
        super().__init__(f"{what} needs {error.name}; install it with: pip install 'jaxgpt2[{extra}]'")
