"""Run functions on encrypted data: one interface, several engines. See `fhe.backend`.

Importing this package imports no library of encryption; `get_backend(name)` does.
"""

import warnings

from .backend import (
    LOOKUP_TIMES,
    MILLISECONDS_PER_LOOKUP,
    Backend,
    Circuit,
    CircuitReport,
    Cost,
    Function,
    Keys,
    Ops,
    Output,
    Report,
    Rounding,
    RunCost,
    Settings,
    Table,
    backends,
    get_backend,
    register_backend,
)
from .cache import cached_keys, compile_cached
from .clear import NumpyOps
from .errors import (
    BackendUnavailable,
    CircuitFormatError,
    CompilationError,
    FHEError,
    InsecureParameters,
    KeyMismatch,
    NoWeights,
    UnknownBackend,
)
from .steps import Steps
from .wire import Port, Ports

__all__ = [
    "LOOKUP_TIMES",
    "MILLISECONDS_PER_LOOKUP",
    "Backend",
    "BackendUnavailable",
    "Circuit",
    "CircuitFormatError",
    "CircuitReport",
    "CompilationError",
    "Cost",
    "FHEError",
    "Function",
    "InsecureParameters",
    "KeyMismatch",
    "Keys",
    "NoWeights",
    "NumpyOps",
    "Ops",
    "Output",
    "Port",
    "Ports",
    "Report",
    "Rounding",
    "RunCost",
    "Settings",
    "Steps",
    "Table",
    "UnknownBackend",
    "backends",
    "cached_keys",
    "compile_cached",
    "get_backend",
    "register_backend",
]


def _clear() -> Backend:
    from .clear import ClearBackend

    return ClearBackend()


def _concrete() -> Backend:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # concrete-python 2.11.0
            from .concrete import ConcreteBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"the backend 'concrete' needs concrete-python ({error}); install it with: pip install jaxgpt2[fhe]"
        ) from error
    return ConcreteBackend()


def _ckks() -> Backend:
    try:
        from .ckks import CKKSBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"the backend 'ckks' needs tenseal ({error}); install it with: pip install jaxgpt2[ckks]"
        ) from error
    return CKKSBackend()


register_backend("clear", _clear)
register_backend("concrete", _concrete)
register_backend("ckks", _ckks)
