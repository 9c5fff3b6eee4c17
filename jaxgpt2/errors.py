"""The base of every error that a wrong input causes."""


class InputError(ValueError):
    """Something a person gave cannot be used. The message is one line: what was wanted, what came, what to do."""
