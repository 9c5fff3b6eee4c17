"""Every error this package raises on purpose. Each message is one line that says what to do."""


class FHEError(Exception):
    """Base of the errors of this package."""


class UnknownBackend(FHEError):
    """No backend of that name is registered."""


class BackendUnavailable(FHEError):
    """The library that a backend needs is not installed.

    backend: its name; package: what the library is called where Python packages come from.
    """

    def __init__(self, backend: str, package: str, reason: object):
        super().__init__(f"the backend {backend!r} needs {package}, which cannot be imported: {reason}")
        self.backend, self.package = backend, package


class CompilationError(FHEError):
    """A function cannot become a circuit: too wide for a lookup, no secure parameters, an unknown operation."""


class KeyMismatch(FHEError):
    """Keys, ciphertexts and circuit do not belong together."""


class CircuitFormatError(FHEError):
    """Bytes or files that are damaged, cut short, of another format, or not what is wanted in their place."""


class NoWeights(FHEError):
    """The client's half of a circuit, which has no weights, is asked to compute."""


class InsecureParameters(FHEError):
    """Parameters of an engine that give less than 128-bit security; refused."""
