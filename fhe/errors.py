"""The errors of this package. Each message is one line."""


class FHEError(Exception):
    """Base of the errors of this package."""


class UnknownBackend(FHEError):
    """No backend of that name is registered."""


class BackendUnavailable(FHEError):
    """The library that a backend needs is not installed.

    backend: name of the backend; package: name of the library on PyPI.
    """

    def __init__(self, backend: str, package: str, reason: object):
        super().__init__(f"the backend {backend!r} needs {package}, which cannot be imported: {reason}")
        self.backend, self.package = backend, package


class CompilationError(FHEError):
    """A function cannot be compiled: a lookup is too wide, no parameters are secure, an operation is unknown."""


class KeyMismatch(FHEError):
    """Keys, ciphertexts and circuit do not belong together."""


class CircuitFormatError(FHEError):
    """Bytes or files that are damaged, truncated, of another format, or in the wrong place."""


class UnknownName(CircuitFormatError):
    """A saved circuit that names a function or a class which is not known here (see `fhe.register_functions`)."""


class NoWeights(FHEError):
    """The client's half of a circuit, which has no weights, was asked to compute."""


class InsecureParameters(FHEError):
    """Parameters that give less than 128-bit security."""
